"""``codegraft demo``: the main job from a repository to a swapped adapter, with its figures."""
