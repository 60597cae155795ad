"""Makers of SDAR's test data: a checkpoint with random weights, and the dense reference."""
