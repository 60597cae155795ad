"""What changes vLLM: one installer a file, and the table of them.

    table.py   THE TABLE: every patch, why it exists, when it can go
    early.py   the rows that are installed before vLLM is imported

What vLLM and the host are, which changes nothing, stands in ``upstream``. Importing this package or
the table imports neither vLLM nor torch.
"""
