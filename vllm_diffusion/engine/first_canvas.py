"""The first canvas behind a prompt: how wide it is, and that a seed canvas fits into it.

On a grid it is what the prompt leaves of a block, so only where a request enters can it be known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from vllm_diffusion import grid
from vllm_diffusion.engine import carriers
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_diffusion.request.options import DiffusionParams


def first_width(model: ModelConfig, params: DiffusionParams, prompt_length: int) -> int:
    """Rows of the first canvas behind a prompt."""
    served = carriers.served(model.hf_config)
    asked = params.canvas_length or served.canvas_length
    end = prompt_length + asked
    return grid.canvas_width(served.family, known=prompt_length, asked=asked, end=end)


def check_seed(model: ModelConfig, params: DiffusionParams, prompt_length: int) -> None:
    """Refuse a seed canvas that is wider than the first canvas behind a prompt.

    Raises:
        VLLMValidationError: it is.
    """
    width = first_width(model, params, prompt_length)
    if len(params.seed_canvas) > width:
        raise VLLMValidationError(
            f"diffusion_seed_canvas holds {len(params.seed_canvas)} ids, but the first canvas "
            f"behind this prompt of {prompt_length} tokens ends with its block and has {width}"
        )


def leave_widths_to_us(inputs: InputProcessor) -> None:
    """Keep vLLM from comparing seed canvases with one width, where it is not that of a canvas.

    On a grid canvases have several, and with a horizon vLLM's width is that of all rows. vLLM reads
    nothing else of what is dropped here.
    """
    model = inputs.model_config
    if model.is_diffusion and carriers.served(model.hf_config).family.text is not Text.CAUSAL:
        inputs.diffusion_config = None
