"""Layers of quantised checkpoints on CPU hosts, where stock vLLM runs none of the released ones.

forms.py            how files store the matrix of a layer: a new format starts here
layers.py           linear layers and experts that keep the matrix packed
configuration.py    which layers of a checkpoint are of this kind; all that a model class asks

The arithmetic is in ``vllm_diffusion.quant``. ``testing.quantise`` writes such checkpoints.
"""
