"""Adapters on their way out of the house, and into it."""
