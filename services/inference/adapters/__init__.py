"""LoRA adapters: verified, staged, pinned by streams, swapped between steps, freed when the last stream has ended."""
