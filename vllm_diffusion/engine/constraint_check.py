"""What is wrong with the constraint of a request, all of it at once, where the request enters.

Takes a request's sampling parameters, completed with the ids that the tokenizer and the model give
them, and the engine's compiler. Gives sentences for one answer of status 400.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from vllm.v1.structured_output.request import get_structured_output_key

from vllm_diffusion.constrain.automaton.allowed import restricted
from vllm_diffusion.constrain.automaton.walk import Walk
from vllm_diffusion.engine.compiler import ParsedConstraint, kept_by
from vllm_diffusion.errors import ConstraintError
from vllm_diffusion.params import admitted_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import ModelConfig, StructuredOutputsConfig

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.engine.compiler import Kept


def constraint_problems(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> list[str]:
    """Everything wrong with a constraint, whatever the prompt.

    Args:
        sampling: with a constraint that vLLM takes, completed.
        model: the engine's.
        config: the engine's.
        tokenizer: the engine's.
    """
    problems = []
    if words := [word for word in sampling.bad_words_token_ids or () if len(word) > 1]:
        problems.append(
            "bad_words of several tokens cannot be kept out of a constrained text; token ids of "
            f"those: {reprlib.repr(words)}"
        )
    try:
        kept = constraint_for(sampling, model, config, tokenizer)
    except ConstraintError as error:
        return [*problems, str(error)]
    # A prompt has a token at least.
    room = model.max_model_len - 1
    limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    if too_short := no_room(kept, limit):
        return [*problems, too_short]
    params = admitted_params(sampling.extra_args)
    pins = {at: params.seed_canvas[at] for at in params.pinned if at < len(params.seed_canvas)}
    pins = {at: token for at, token in pins.items() if at < limit}
    if isinstance(kept, ParsedConstraint):
        promises = {"diffusion_pinned": pins, "allowed_token_ids": sampling.allowed_token_ids}
        problems += [
            f"{name} cannot be promised together with a constraint as large as this one"
            for name, asked in promises.items()
            if asked
        ]
    elif not _can_hold(kept, pins, limit):
        problems.append("no text of the constraint has the tokens that diffusion_pinned holds")
    return problems


def _can_hold(automaton: TokenAutomaton, pins: Mapping[int, int], limit: int) -> bool:
    known = {at: token for at, token in pins.items() if token < len(automaton.class_of)}
    return Walk(automaton).can_hold(known, limit)


def constraint_for(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> Kept:
    """What keeps a request's constraint, as the engine's core will ask for it.

    Raises:
        ConstraintError: nothing does.
    """
    kept = kept_by(
        get_structured_output_key(sampling.structured_outputs),
        sampling.all_stop_token_ids,
        tokenizer=tokenizer,
        vocab_size=model.get_vocab_size(),
        config=config,
    )
    if sampling.allowed_token_ids is None or isinstance(kept, ParsedConstraint):
        return kept
    return restricted(kept, sampling.allowed_token_ids)


def no_room(kept: Kept, limit: int, *, thinks: bool = False) -> str | None:
    """Why no text of the constraint can be complete within ``limit`` tokens, if that is so.

    Args:
        kept: the constraint; of one that a parser follows that is not known.
        limit: tokens that the request may write.
        thinks: the token that ends its thinking comes first.
    """
    if isinstance(kept, ParsedConstraint):
        return "a constraint as large as this one cannot begin behind thinking" if thinks else None
    least = int(kept.distance[kept.start]) + thinks
    if least <= limit:
        return None
    return (
        f"the shortest text of the constraint has {least} tokens, but max_tokens and max_model_len "
        f"leave {limit}"
    )
