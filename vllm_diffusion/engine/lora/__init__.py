"""LoRA adapters: whether one fits, and the rows of a forward that pass through it."""
