"""What Transformers calls the parts of its DiffusionGemma, whichever version is installed.

Everything that calls its layers by keyword asks here: tests, benchmarks, the oracle.
"""

import inspect
from typing import Final

from transformers import DiffusionGemmaForBlockDiffusion

CACHE: Final = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters
)
"""The keyword of the KV cache: `cache` from Transformers 5.24 on, `past_key_values` before."""
