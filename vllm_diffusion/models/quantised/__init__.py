"""Quantised checkpoints on CPU hosts, where stock vLLM runs none of the released ones.

forms.py            how files store the matrix of a layer
layers.py           linear layers and experts that keep it packed
configuration.py    which layers of a checkpoint are these; the only part the model asks
"""
