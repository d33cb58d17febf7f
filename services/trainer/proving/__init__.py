"""Whether an adapter helps: losses and lines on held-out code, and on code of others."""
