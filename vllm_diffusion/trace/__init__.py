"""Record the statistics and decisions of every denoising step; replay rules without a model.

record -> one file per request, written while an engine runs (``VLLM_DIFFUSION_TRACE=DIR``)
file   -> the file format, and reading it
replay -> any rule on the recorded statistics, with the code that serves
"""
