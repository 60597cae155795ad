"""Record what every denoising step saw and decided; run rules on the recording without a model.

record -> one file a request, written while an engine runs (``VLLM_DIFFUSION_TRACE=DIR``)
file   -> what stands in such a file, and reading it
replay -> any rule on the recorded statistics, through the live code
"""
