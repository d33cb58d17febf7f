"""Readers: one module for each kind of source, each yielding files without ever writing one by its name."""
