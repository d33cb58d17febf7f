"""The ``codegraft`` command, and the local stack it can start."""
