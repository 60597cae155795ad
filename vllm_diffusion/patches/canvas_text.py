"""Text on a canvas becomes ids where vLLM keeps the tokenizer: where a request enters the engine.

``InputProcessor.process_inputs`` makes the engine's own request from a client's. There the prompt
and every limit is known, and the parameters are a copy: the client's object is not touched.

A suffix is a field of `/v1/completions`. vLLM takes it for models whose tokenizer has a format for
it and refuses it for all others; a canvas needs no format.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.request.text import Rows

SUFFIX = "diffusion_suffix"


def write_rows() -> None:
    """Make `InputProcessor.process_inputs` replace the text on a canvas by rows of ids."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        sampling = request.sampling_params
        if sampling is not None:
            rows = rows_of_request(self, sampling, request.prompt_token_ids)
            if rows is not None:
                sampling.extra_args = _with_rows(sampling.extra_args, rows)
        return request

    InputProcessor.process_inputs = process_inputs


def rows_of_request(
    input_processor: Any, sampling: Any, prompt: Sequence[int] | None
) -> Rows | None:
    """The rows of the text on a request's canvas; None where there is none.

    Args:
        input_processor: vLLM's, of the engine that the request goes to.
        sampling: the request's parameters, checked, completed with the model's ids.
        prompt: token ids, None if they are not known.

    Raises:
        VLLMValidationError: the text does not fit, or cannot be written.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_diffusion.request.options import admitted_params
    from vllm_diffusion.request.text import Frame, rows_of

    model = input_processor.model_config
    if not (model.is_diffusion and _has_text(sampling.extra_args)):
        return None
    params = admitted_params(sampling.extra_args)
    assert params.text is not None
    tokenizer = input_processor.tokenizer
    if tokenizer is None:
        raise VLLMValidationError(
            "text on a canvas needs the tokenizer that this engine leaves out"
        )
    left = model.max_model_len - len(prompt or ())
    frame = Frame(
        width=params.canvas_length or model.hf_config.canvas_length,
        left=left,
        max_tokens=left if sampling.max_tokens is None else sampling.max_tokens,
        end=_end_of_turn(input_processor, prompt or ()),
        stops={*sampling.all_stop_token_ids, *(sampling.stop_token_ids or ())},
        pad=tokenizer.pad_token_id,
        skips_special=sampling.skip_special_tokens,
    )
    try:
        return rows_of(params.text, tokenizer, frame)
    except ParamsError as error:
        raise VLLMValidationError(str(error)) from error


def check_text(input_processor: Any, sampling: Any, prompt: Any) -> None:
    """Refuse at once what `process_inputs` would refuse after an answer has begun.

    Args:
        input_processor: vLLM's.
        sampling: a request's parameters as its client sent them, checked.
        prompt: whatever the engine is asked to continue.

    Raises:
        VLLMValidationError: the text on the canvas does not fit, or cannot be written.
    """
    if not _has_text(sampling.extra_args):
        return
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if ids is not None and len(ids) >= input_processor.model_config.max_model_len:
        return  # vLLM says that better
    completed = sampling.clone()
    completed.update_from_generation_config(
        input_processor.generation_config_fields, input_processor.renderer.get_eos_token_id()
    )
    rows_of_request(input_processor, completed, ids)


def _end_of_turn(input_processor: Any, prompt: Sequence[int]) -> int | None:
    """The id to end an answer with: that which ended the last turn, or the tokenizer's own."""
    ids = input_processor.generation_config_fields.get("eos_token_id")
    ends = {ids} if isinstance(ids, int) else set(ids or ())
    return next(
        (token for token in reversed(prompt) if token in ends),
        input_processor.renderer.get_eos_token_id(),
    )


def _has_text(extra: dict[str, Any] | None) -> bool:
    from vllm_diffusion.request.options import PREFIX
    from vllm_diffusion.request.text import TEXTS

    return any(f"{PREFIX}{name}" in (extra or {}) for name in TEXTS)


def _with_rows(extra: dict[str, Any], rows: Rows) -> dict[str, Any]:
    from vllm_diffusion.request.options import PREFIX
    from vllm_diffusion.request.text import NOISE_LEVEL, ROWS, TEXTS

    kept = {name: value for name, value in extra.items() if name.removeprefix(PREFIX) not in TEXTS}
    if rows.holes is None:
        kept.setdefault(f"{PREFIX}noise_level", NOISE_LEVEL)
    return kept | {ROWS: rows.packed()}


def take_suffix() -> None:
    """Make `OnlineRenderer.render_completion` take a suffix for a diffusion model as its option."""
    from vllm.renderers.online_renderer import OnlineRenderer

    original = OnlineRenderer.render_completion

    @functools.wraps(original)
    async def render_completion(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.suffix is not None and self.model_config.is_diffusion:
            if refusal := _no_suffix(request):
                return self.create_error_response(refusal, param="suffix")
            if request.suffix:
                request.vllm_xargs = (request.vllm_xargs or {}) | {SUFFIX: request.suffix}
            request.suffix = None
        return await original(self, request, *args, **kwargs)

    OnlineRenderer.render_completion = render_completion


def _no_suffix(request: Any) -> str | None:
    """Why a completion request cannot have a suffix, if it cannot."""
    if request.suffix and SUFFIX in (request.vllm_xargs or {}):
        return f"suffix and vllm_xargs.{SUFFIX} both say what follows the answer: keep one"
    others = {"echo": request.echo, "use_beam_search": request.use_beam_search}
    asked = [name for name, is_asked in others.items() if is_asked]
    return f"suffix excludes {', '.join(asked)}" if request.suffix and asked else None


def requests_lack_a_hook() -> bool:
    """Whether the tokenizer still meets a request in `process_inputs` and nowhere we could ask."""
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(inspect.unwrap(InputProcessor.process_inputs))
    return "sampling_params.update_from_tokenizer(self.tokenizer)" in source


def suffix_is_refused() -> bool:
    """Whether vLLM still has no way but a tokenizer's format for a suffix."""
    from vllm.renderers.online_renderer import OnlineRenderer

    source = inspect.getsource(inspect.unwrap(OnlineRenderer.render_completion))
    return "suffix is only supported for models with FIM" in source
