"""Where a request is admitted: everything is checked here, and the engine gets one record of it.

    before an answer begins    ``check_before_answer``     what a stream would refuse too late
    vLLM's own checks          ``check_parameters``        one message that names every problem
                               ``check_constraint``        the same, with what the constraint lacks
    the request enters         ``admit``                   text becomes rows, the constraint is sent
                                                           compiled, the options as a record

It runs in the process that a client talks to, which has tokenizer, prompt and limits; a refusal is
an answer of status 400. ``patches.request_validation`` and ``patches.request_entry`` call it from
vLLM.
"""

# ruff: noqa: SLF001 - vLLM's own checks of parameters have private names.

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.constraints.check import (
    compile_first,
    constraint_problems,
    no_room_behind,
    sent_constraint,
)
from vllm_diffusion.engine.constraints.compiler import as_text
from vllm_diffusion.engine.constraints.thinking import thinking_takes
from vllm_diffusion.engine.first_canvas import check_seed, first_width
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.request.admitted import admitted
from vllm_diffusion.request.options import read_options
from vllm_diffusion.request.parse import parse_params
from vllm_diffusion.request.text import Frame, rows_of
from vllm_diffusion.upstream.core_messages import check_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.config import ModelConfig, StructuredOutputsConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_diffusion.request.options import DiffusionParams
    from vllm_diffusion.request.text import Rows

# What goes to the engine beside the parameters, and what clients call it.
PASSED_ON: Final = {
    "priority": "priority",
    "session_id": "session_id",
    "reasoning_parser_kwargs": "chat_template_kwargs",
}

# vLLM goes on behind a turn with what it counts as computed. If a turn ends inside a canvas that is
# too much, which ends the engine; where commits are fused, the canvas is missing.
_NO_STREAMING_INPUT: Final = (
    "a diffusion model takes no input that comes piece by piece: the canvas that ends a turn has "
    "rows behind its end, and nothing can be appended to them. Send every turn as a request of its "
    "own that holds the conversation so far; the prefix cache keeps its beginning"
)


# ---- parameters, whatever the prompt ----


def check_parameters(sampling: SamplingParams, model: ModelConfig) -> None:
    """Refuse what a canvas cannot honour.

    With a constraint, ``check_constraint`` says everything at once.

    Raises:
        VLLMValidationError: everything that is wrong.
    """
    if sampling.structured_outputs is not None:
        return
    try:
        _parse(sampling, model)
    except ParamsError as error:
        raise VLLMValidationError(str(error)) from error


def check_constraint(
    sampling: SamplingParams,
    model: ModelConfig,
    config: StructuredOutputsConfig | None,
    tokenizer: Any,
) -> None:
    """Refuse a constraint that cannot be kept, and parameters with it that cannot be honoured.

    Args:
        sampling: of a request; its schema becomes text.
        model: vLLM's config, of a diffusion model.
        config: how the engine was asked to read constraints.
        tokenizer: the engine's.

    Raises:
        VLLMValidationError: everything that is wrong.
    """
    if sampling.structured_outputs is None:
        return
    if tokenizer is None:
        raise VLLMValidationError(
            "a constraint requires a tokenizer, and skip_tokenizer_init leaves it out"
        )
    problems = []
    try:
        _parse(sampling, model)
    except ParamsError as error:
        problems.append(str(error))
    try:
        if config is not None:
            sampling.structured_outputs = as_text(sampling.structured_outputs)
            params, _ = read_options(sampling.extra_args or {})
            whole = _completed(sampling, model, tokenizer)
            problems += constraint_problems(whole, params, model, config, tokenizer)
    except (ValueError, VLLMValidationError) as error:
        problems.append(str(error))
    if problems:
        raise VLLMValidationError("; ".join(problems))


def _parse(sampling: SamplingParams, model: ModelConfig) -> None:
    served = carriers.served(model.hf_config)
    parse_params(
        sampling,
        canvas_length=served.canvas_length,
        vocab_size=model.get_vocab_size(),
        rules=served.rules,
        text=served.family.text,
        banned=served.family.banned,
    )


def _completed(sampling: SamplingParams, model: ModelConfig, tokenizer: Any) -> SamplingParams:
    """A copy that knows the ids of end tokens and bad words, as the engine's core will see it."""
    copy = sampling.clone()
    # vLLM would read the file for every request.
    ends = carriers.served(model.hf_config).family.ends
    copy.update_from_generation_config({"eos_token_id": ends or None}, tokenizer.eos_token_id)
    copy.update_from_tokenizer(tokenizer)
    return copy


# ---- with the prompt, before an answer begins ----


def check_before_answer(
    sampling: SamplingParams, prompt: Any, engine: Any, told: Mapping[str, Any] | None = None
) -> None:
    """Check a whole request, which vLLM does after a streamed answer has begun with status 200.

    Args:
        sampling: its parameters, as the client sent them.
        prompt: whatever the engine is asked to continue.
        engine: vLLM's AsyncLLM or LLMEngine.
        told: what a server tells the engine beside them, as ``AsyncLLM.generate`` names it; None
            where there is no server.

    Raises:
        VLLMValidationError: it cannot be served. vLLM's own checks of what only a server knows,
            vocabulary and limits, are made too.
    """
    model, inputs = engine.model_config, engine.input_processor
    if not model.is_diffusion:
        return
    if inspect.isasyncgen(prompt):
        raise VLLMValidationError(_NO_STREAMING_INPUT)
    # Ids before the constraint, which is compiled for the tokens that they name.
    sampling._validate_logprobs(model)
    sampling._validate_logit_bias(model)
    sampling._validate_stop_token_ids(model)
    sampling._validate_allowed_token_ids(model)
    check_parameters(sampling, model)
    check_constraint(sampling, model, inputs.structured_outputs_config, inputs.tokenizer)
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    _check_text(inputs, sampling, ids)
    if sampling.structured_outputs is not None:
        server = told or {}
        thinking = thinking_takes(
            engine,
            ids or (),
            ended=server.get("reasoning_ended"),
            parser_kwargs=server.get("reasoning_parser_kwargs"),
        )
        _check_room(inputs, sampling, len(ids or ()), before=thinking)
    if told is not None:
        check_message(sampling, {known: told.get(name) for name, known in PASSED_ON.items()})


def _check_text(
    inputs: InputProcessor, sampling: SamplingParams, prompt: Sequence[int] | None
) -> None:
    """Refuse text that does not fit the canvas behind a prompt, or cannot be written."""
    params, _ = read_options(sampling.extra_args or {})
    if prompt is not None and len(prompt) >= inputs.model_config.max_model_len:
        return  # vLLM says better what is too long
    if prompt is not None:
        check_seed(inputs.model_config, params, len(prompt))
    if params.text is None:
        return
    completed = sampling.clone()
    completed.update_from_generation_config(
        inputs.generation_config_fields, inputs.renderer.get_eos_token_id()
    )
    _rows(inputs, completed, params, prompt or ())


def _check_room(
    inputs: InputProcessor, sampling: SamplingParams, prompt_length: int, *, before: int = 0
) -> None:
    """Refuse a constraint whose shortest text does not fit behind a prompt and ``before`` tokens.

    Raises:
        VLLMValidationError: it does not fit.
    """
    model, tokenizer = inputs.model_config, inputs.tokenizer
    completed = _completed(sampling, model, tokenizer)
    config = inputs.structured_outputs_config
    if problem := no_room_behind(prompt_length, completed, model, config, tokenizer, before=before):
        raise VLLMValidationError(problem)


# ---- where a request enters ----


def admit(inputs: InputProcessor, request: EngineCoreRequest) -> None:
    """Complete the engine's own request, which is made of a client's.

    The parameters are a copy: the client's object is not touched.

    Args:
        inputs: vLLM's, of the engine that the request goes to.
        request: checked and completed by vLLM.

    Raises:
        VLLMValidationError: text or a seed on the canvas does not fit or cannot be written, or a
            constraint has no text that fits behind the prompt.
    """
    model, sampling = inputs.model_config, request.sampling_params
    if sampling is None or not model.is_diffusion:
        return
    served = carriers.served(model.hf_config)
    if ends := served.family.unlisted_ends:
        end = inputs.renderer.get_eos_token_id()
        sampling.update_from_generation_config({"eos_token_id": [*ends]}, end)
    prompt = request.prompt_token_ids or ()
    params, _ = read_options(sampling.extra_args or {})
    check_seed(model, params, len(prompt))
    if params.read_only and sampling.max_tokens is not None:
        # vLLM's own limit is a width that the canvas need not have.
        width = first_width(model, params, len(prompt))
        sampling.max_tokens = min(sampling.max_tokens, width)
    rows = None if params.text is None else _rows(inputs, sampling, params, prompt)
    if sampling.structured_outputs is not None:
        _check_room(inputs, sampling, len(prompt))
        config = inputs.structured_outputs_config
        carriers.put_constraint(
            sampling, sent_constraint(sampling, model, config, inputs.tokenizer)
        )
    carriers.put_admitted(sampling, admitted(params, served.rules, rows))


def _rows(
    inputs: InputProcessor,
    sampling: SamplingParams,
    params: DiffusionParams,
    prompt: Sequence[int],
) -> Rows:
    """The rows of the text on a request's canvas.

    Args:
        inputs: vLLM's.
        sampling: the request's, completed with the model's ids.
        params: its options, with a text.
        prompt: token ids, none if they are not known.

    Raises:
        VLLMValidationError: the text does not fit, or cannot be written.
    """
    model, tokenizer = inputs.model_config, inputs.tokenizer
    if tokenizer is None:
        raise VLLMValidationError(
            "text on a canvas needs the tokenizer that this engine leaves out"
        )
    assert params.text is not None
    left = model.max_model_len - len(prompt)
    frame = Frame(
        width=first_width(model, params, len(prompt)),
        next_width=params.canvas_length or carriers.served(model.hf_config).canvas_length,
        left=left,
        max_tokens=left if sampling.max_tokens is None else sampling.max_tokens,
        end=_end_of_turn(inputs, prompt),
        stops={*sampling.all_stop_token_ids, *(sampling.stop_token_ids or ())},
        pad=tokenizer.pad_token_id,
        skips_special=sampling.skip_special_tokens,
    )
    try:
        return rows_of(params.text, tokenizer, frame)
    except ParamsError as error:
        raise VLLMValidationError(str(error)) from error


def _end_of_turn(inputs: InputProcessor, prompt: Sequence[int]) -> int | None:
    """The id to end an answer with: that which ended the last turn, or the tokenizer's own."""
    ids = inputs.generation_config_fields.get("eos_token_id")
    ends = {ids} if isinstance(ids, int) else set(ids or ())
    return next(
        (token for token in reversed(prompt) if token in ends),
        inputs.renderer.get_eos_token_id(),
    )


# ---- over HTTP, before the parameters are made ----


def refuse_beams(request: Any) -> None:
    """Refuse what a beam search does not honour; vLLM's parameters of beams do not have it.

    A beam is written token by token and held to no constraint. From vLLM 0.33 on beams have
    `allowed_token_ids`, which vLLM refuses for diffusion models.

    Args:
        request: of any route.

    Raises:
        VLLMValidationError: it asks for both.
    """
    if not vars(request).get("use_beam_search"):
        return
    if request.extract_structured_outputs() is not None:
        raise VLLMValidationError(
            "use_beam_search and a constraint (response_format, structured_outputs or tools that "
            "must be called) exclude each other: beams are not held to it"
        )
    if request.allowed_token_ids is not None:
        raise VLLMValidationError(
            "use_beam_search and allowed_token_ids exclude each other: beams are not held to them"
        )


async def compile_constraint(renderer: Any, request: Any, prompts: Sequence[Any]) -> None:
    """Have the constraint of a request compiled, so that its checks find it.

    Args:
        renderer: vLLM's, of the engine.
        request: of any route.
        prompts: as rendered.
    """
    if (asked := request.extract_structured_outputs()) is None:
        return
    model, tokenizer = renderer.config.model_config, renderer.get_tokenizer()
    sampling = SamplingParams(
        structured_outputs=as_text(asked),
        stop_token_ids=vars(request).get("stop_token_ids"),
        max_tokens=_most_tokens(request, prompts, model),
    )
    config = renderer.config.structured_outputs_config
    await compile_first(_completed(sampling, model, tokenizer), model, config, tokenizer)


def _most_tokens(request: Any, prompts: Sequence[Any], model: ModelConfig) -> int:
    """At least as many tokens as the request may write."""
    fields = vars(request)
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    asked = next((fields[name] for name in names if fields.get(name) is not None), None)
    shortest = min((len(each.get("prompt_token_ids") or ()) for each in prompts), default=0)
    left = max(model.max_model_len - shortest, 1)
    return left if asked is None else min(asked, left)
