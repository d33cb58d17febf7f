"""Token generation: a scheduler that knows no torch, one runner that owns the tensors, a step loop that joins them."""
