"""The trainer service: datasets become LoRA adapters, and the best of them is published."""
