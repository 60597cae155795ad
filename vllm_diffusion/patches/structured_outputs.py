"""A constraint is checked where its request enters: it compiles, and fits what may be written.

vLLM refuses every constraint of a diffusion model, and others by what its own backends cannot keep.
Here ours are checked by what is asked of ours, and everything that is wrong is said at once. What
depends on the prompt, how many tokens are left behind it, is checked where the prompt is known.
"""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import replace
from typing import Any

from vllm_diffusion.errors import ParamsError


def take_constraints() -> None:
    """Replace `SamplingParams._validate_structured_outputs` for diffusion models."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from vllm_diffusion.engine.constraints.check import constraint_problems
    from vllm_diffusion.patches.request_validation import parse_for

    original = SamplingParams._validate_structured_outputs

    @functools.wraps(original)
    def _validate_structured_outputs(
        self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        if not model_config.is_diffusion:
            original(self, model_config, structured_outputs_config, tokenizer)
            return
        if self.structured_outputs is None:
            return
        if tokenizer is None:
            raise VLLMValidationError(
                "a constraint requires a tokenizer, and skip_tokenizer_init leaves it out"
            )
        problems = []
        try:
            parse_for(self, model_config)
        except ParamsError as error:
            problems.append(str(error))
        try:
            if structured_outputs_config is not None:
                self.structured_outputs = as_text(self.structured_outputs)
                problems += constraint_problems(
                    completed(self, model_config, tokenizer),
                    model_config,
                    structured_outputs_config,
                    tokenizer,
                )
        except (ValueError, VLLMValidationError) as error:
            problems.append(str(error))
        if problems:
            raise VLLMValidationError("; ".join(problems))

    SamplingParams._validate_structured_outputs = _validate_structured_outputs


def as_text(asked: Any) -> Any:
    """The same constraint, a JSON schema as text: that is looked at, copied and sent many times.

    Args:
        asked: vLLM's StructuredOutputsParams.

    Raises:
        VLLMValidationError: it is nested too deep, or asks for nothing.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import check_json_nesting

    check_json_nesting(asked.json)
    check_json_nesting(asked.structural_tag, structural_tag=True)
    if asked.json_object is False:
        raise VLLMValidationError("structured_outputs.json_object is true or left out, not false")
    if asked.json is None or isinstance(asked.json, str):
        return asked
    return replace(asked, json=json.dumps(asked.json))


def completed(sampling: Any, model_config: Any, tokenizer: Any) -> Any:
    """A copy that knows the ids of end tokens and bad words, as the engine's core will see it."""
    from vllm_diffusion.engine import carriers

    copy = sampling.clone()
    # vLLM would read the file for every request.
    ends = carriers.served(model_config.hf_config).family.ends
    copy.update_from_generation_config({"eos_token_id": ends or None}, tokenizer.eos_token_id)
    copy.update_from_tokenizer(tokenizer)
    return copy


def check_room(input_processor: Any, sampling: Any, prompt_length: int, *, before: int = 0) -> None:
    """Refuse a constraint whose shortest text does not fit behind the prompt.

    Args:
        input_processor: vLLM's, of the engine that the request goes to.
        sampling: the request's parameters, checked.
        prompt_length: tokens.
        before: tokens that thinking takes before it.

    Raises:
        VLLMValidationError: it does not fit.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_diffusion.engine.constraints.check import constraint_for, no_room
    from vllm_diffusion.engine.constraints.compiler import vocabulary_for

    model = input_processor.model_config
    if not model.is_diffusion or sampling.structured_outputs is None:
        return
    left = model.max_model_len - prompt_length
    limit = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
    config, tokenizer = input_processor.structured_outputs_config, input_processor.tokenizer
    kept = constraint_for(completed(sampling, model, tokenizer), model, config, tokenizer)
    longest = vocabulary_for(tokenizer, model.get_vocab_size()).longest
    if problem := no_room(kept, limit, longest=longest, before=before):
        raise VLLMValidationError(problem)


def diffusion_is_refused() -> bool:
    """Whether vLLM's own check still refuses every constraint of a diffusion model."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_structured_outputs)
    return "if model_config.is_diffusion:" in inspect.getsource(original)
