"""DiffusionGemma: a Gemma 4 mixture of experts that writes a canvas at a time."""
