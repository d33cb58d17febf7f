"""Base models: which there are, where their weights lie on this machine, and how each wants its prompts."""
