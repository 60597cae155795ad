"""Matrices in few bits, for CPU hosts: as a quantised checkpoint stores them, or made here.

`packed` says what such a matrix is and is the reference; `product` multiplies with one panel by
panel, and `native` unpacks the panels in C++. `rounding` makes one of a plain matrix; `int8` rounds
both sides of a product. Who uses them: `engine.packed_layers` for the layers of a quantised
checkpoint, `head.output_copy` for logits that need not be exact.
"""
