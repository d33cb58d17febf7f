"""One run in the hands of a worker: what its processes tell is told on, committed and counted."""
