"""Who sees whom: the segments of a step, and how a CPU or GPU backend is told of them."""
