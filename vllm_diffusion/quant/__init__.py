"""Matrices kept in the few bits that a quantised checkpoint stores, for CPU hosts.

`packed` says what such a matrix is and is the reference; `product` multiplies with one panel by
panel, and `native` unpacks the panels in C++.
"""
