"""Base model and adapters in, streamed completions out."""
