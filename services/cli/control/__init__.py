"""The control state from outside: where it is, and how it is saved, brought back, and made anew from the store."""
