"""What is wrong with the constraint of a request, all of it at once, where the request enters.

Takes a request's sampling parameters, completed with the ids that the tokenizer and the model give
them, and what is known of the engine. Gives sentences for one answer of status 400.
"""

from __future__ import annotations

import asyncio
import reprlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.automaton.allowed import restricted
from vllm_diffusion.constrain.automaton.packed import unpacked
from vllm_diffusion.constrain.automaton.walk import Walk
from vllm_diffusion.constrain.outcomes import KeptByAutomaton, KeptByParser, Refused
from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.constraints.compiler import (
    as_sent,
    compiling,
    source_of,
    vocabulary_for,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from concurrent.futures import Future

    from vllm.config import ModelConfig, StructuredOutputsConfig

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.constrain.outcomes import ConstraintSource, Outcome
    from vllm_diffusion.request.options import DiffusionParams

_compiled: ContextVar[tuple[ConstraintSource, Outcome] | None] = ContextVar(
    "compiled", default=None
)
"""Of the request that a task is about: nobody else need keep it until it is checked."""


def constraint_source(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig
) -> ConstraintSource:
    """A request's constraint, with the tokens that end a text of it."""
    # Others are refused by vLLM's own check, which comes later.
    ends = {token for token in sampling.all_stop_token_ids if 0 <= token < model.get_vocab_size()}
    family = carriers.served(model.hf_config).family
    ends -= set(family.banned)
    return source_of(sampling.structured_outputs, ends, config, tool_form=family.tools)


def asked_for(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> Future[Outcome]:
    """What becomes of a request's constraint, in time.

    Args:
        sampling: with a constraint, completed.
        model: the engine's.
        config: the engine's.
        tokenizer: the engine's.
    """
    return compiling(
        constraint_source(sampling, model, config),
        tokenizer=tokenizer,
        vocab_size=model.get_vocab_size(),
        limit=_limit(sampling, model),
        banned=_banned(model),
    )


async def compile_first(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> None:
    """Have a request's constraint compiled, so that its checks, in this task, need not wait.

    Args:
        sampling, model, config, tokenizer: as above.
    """
    # Seconds, the first time.
    await asyncio.to_thread(vocabulary_for, tokenizer, model.get_vocab_size(), _banned(model))
    outcome = await asyncio.wrap_future(asked_for(sampling, model, config, tokenizer))
    _compiled.set((constraint_source(sampling, model, config), outcome))


def constraint_for(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> KeptByAutomaton | KeptByParser:
    """What keeps a request's constraint; waits for it, if nobody has asked for it before.

    Raises:
        ConstraintError: nothing does.
    """
    outcome = None
    if (known := _compiled.get()) is not None:
        source, compiled = known
        outcome = compiled if source == constraint_source(sampling, model, config) else None
    outcome = outcome or asked_for(sampling, model, config, tokenizer).result()
    if isinstance(outcome, Refused):
        raise ConstraintError(outcome.message)
    return outcome


def sent_constraint(
    sampling: Any, model: ModelConfig, config: StructuredOutputsConfig, tokenizer: Any
) -> str:
    """What keeps a request's constraint, as it is sent to the engine.

    Raises:
        ConstraintError: nothing does.
    """
    kept = constraint_for(sampling, model, config, tokenizer)
    return as_sent(kept, constraint_source(sampling, model, config).end_ids)


def constraint_problems(
    sampling: Any,
    params: DiffusionParams,
    model: ModelConfig,
    config: StructuredOutputsConfig,
    tokenizer: Any,
) -> list[str]:
    """Everything wrong with a constraint, whatever the prompt.

    Args:
        sampling: with a constraint, completed.
        params: the request's options.
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
    limit, allowed = _limit(sampling, model), sampling.allowed_token_ids
    pins = {at: params.seed_canvas[at] for at in params.pinned if at < len(params.seed_canvas)}
    pins = {at: token for at, token in pins.items() if at < limit}
    try:
        outcome = constraint_for(sampling, model, config, tokenizer)
        if isinstance(outcome, KeptByAutomaton) and (pins or allowed is not None):
            return [*problems, *_broken_promises(unpacked(outcome.data), allowed, pins, limit)]
    except ConstraintError as error:
        return [*problems, str(error)]
    if too_short := no_room(outcome, limit, longest=_longest(model, tokenizer)):
        return [*problems, too_short]
    if isinstance(outcome, KeptByParser):
        promises = {"diffusion_pinned": pins, "allowed_token_ids": allowed}
        problems += [
            f"{name} cannot be promised together with a constraint as large as this one"
            for name, asked in promises.items()
            if asked
        ]
    return problems


def _broken_promises(
    automaton: TokenAutomaton,
    allowed: Collection[int] | None,
    pins: Mapping[int, int],
    limit: int,
) -> list[str]:
    """What else a request was promised that no text of its constraint has.

    Raises:
        ConstraintError: no text is made of the allowed tokens.
    """
    if allowed is not None:
        automaton = restricted(automaton, allowed)
    if (least := int(automaton.distance[automaton.start])) > limit:
        return [_too_short(least, limit)]
    known = {at: token for at, token in pins.items() if token < len(automaton.class_of)}
    if Walk(automaton).can_hold(known, limit):
        return []
    return ["no text of the constraint has the tokens that diffusion_pinned holds"]


def no_room_behind(
    prompt_length: int,
    sampling: Any,
    model: ModelConfig,
    config: StructuredOutputsConfig,
    tokenizer: Any,
    *,
    before: int = 0,
) -> str | None:
    """Why no text of a constraint can be complete behind a prompt, if that is so.

    Args:
        prompt_length: tokens.
        sampling: with a constraint, completed.
        model: the engine's.
        config: the engine's.
        tokenizer: the engine's.
        before: tokens that come first, those of its thinking.
    """
    left = model.max_model_len - prompt_length
    limit = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
    kept = constraint_for(sampling, model, config, tokenizer)
    return no_room(kept, limit, longest=_longest(model, tokenizer), before=before)


def no_room(
    outcome: KeptByAutomaton | KeptByParser, limit: int, *, longest: int, before: int = 0
) -> str | None:
    """Why no text of the constraint can be complete within ``limit`` tokens, if that is so.

    Args:
        outcome: the constraint.
        limit: tokens that the request may write.
        longest: bytes of the longest token, by which is known what fits under a parser.
        before: tokens that come first, those of its thinking.
    """
    if isinstance(outcome, KeptByParser):
        least = before - (-outcome.length // longest)
    else:
        least = before + outcome.tokens
    return None if least <= limit else _too_short(least, limit)


def _too_short(least: int, limit: int) -> str:
    return (
        f"the shortest text of the constraint has {least} tokens, but max_tokens and max_model_len "
        f"leave {limit}"
    )


def _limit(sampling: Any, model: ModelConfig) -> int:
    """Tokens that the request may write, whatever its prompt, which has one at least."""
    room: int = model.max_model_len - 1
    return room if sampling.max_tokens is None else min(sampling.max_tokens, room)


def _longest(model: ModelConfig, tokenizer: Any) -> int:
    return vocabulary_for(tokenizer, model.get_vocab_size(), _banned(model)).longest


def _banned(model: ModelConfig) -> tuple[int, ...]:
    return carriers.served(model.hf_config).family.banned
