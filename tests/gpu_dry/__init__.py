"""The CUDA wheel of vLLM and this plugin on a machine without a GPU; see docs/gpu.md."""
