"""The audit log: who changed what, with what was stored before and after, in a stream of its own."""
