"""Diffusion language models in stock vLLM, as an out-of-tree plugin.

vLLM finds the plugin through the entry point `vllm.general_plugins`; nobody has to import this
package to use it. Importing it changes nothing and loads nothing heavy: neither torch nor vLLM.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
