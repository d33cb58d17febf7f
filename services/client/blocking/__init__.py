# Made by make_blocking.py from services/client/aio; change it there.
"""The blocking client."""
