"""What makes the reference pages of docs/ out of the contract and the code: ``make docs``."""
