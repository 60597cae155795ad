"""The rules of denoising, one a file, pure tensors, batch first.

schedule -> temperature of a step; accept -> which positions keep their sample; renoise -> what the
others become; draft -> what a canvas begins with instead of noise; stop -> whether the canvas is
finished; rng -> the noise all of them draw from.
"""
