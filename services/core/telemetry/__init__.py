"""What a running system tells of itself beside its log: spans (tracing.py) and figures (metrics.py)."""
