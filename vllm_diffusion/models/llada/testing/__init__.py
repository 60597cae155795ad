"""Makers of LLaDA's test data: checkpoints with random weights, and the dense reference."""
