"""The model in training: the base with its adapter, and the layers, attention and loss that make it fast."""
