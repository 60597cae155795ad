"""What the sampling parameters of an admitted request mean on its canvases.

Takes vLLM's ``SamplingParams`` by its attributes, completed with the model's and the tokenizer's
ids. Never raises: whatever cannot be honoured was refused when the request was admitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.constrain.constraints import Constraints

if TYPE_CHECKING:
    from vllm_diffusion.request.admitted import Admitted

GREEDY_SEED: Final = 0
"""The noise key of a request of temperature 0 that names no seed: its answer is always the same."""

_GREEDY_BELOW: Final = 1e-5  # vLLM's own border between sampling and greedy

_ALWAYS: Final = 1 << 32
"""Behind the last position of any output, above the last id of any vocabulary."""


def is_greedy(sampling: Any) -> bool:  # noqa: ANN401
    """Whether the request asks for temperature 0."""
    return bool(sampling.temperature < _GREEDY_BELOW)


def noise_seed(sampling: Any) -> int | None:  # noqa: ANN401
    """The seed that a request's noise is keyed by; None lets its request id decide."""
    if sampling.seed is None and is_greedy(sampling):
        return GREEDY_SEED
    return None if sampling.seed is None else int(sampling.seed)


def ends(
    sampling: Any,  # noqa: ANN401
    admitted: Admitted,
) -> tuple[int, ...]:
    """Ids behind which nothing of the answer is read, wherever they stand; empty if none are known.

    Args:
        sampling: vLLM's ``SamplingParams``, completed with the model's and the tokenizer's ids.
        admitted: what else it asks for.
    """
    # An end within min_tokens, or one that text brings with it, does not end the answer. Words and
    # constraints have a say after the rule has decided.
    unsure = sampling.min_tokens, sampling.bad_words_token_ids, sampling.structured_outputs
    if any(unsure) or admitted.read_only or admitted.holes or admitted.seed_canvas:
        return ()
    own = () if sampling.ignore_eos or sampling.eos_token_id is None else (sampling.eos_token_id,)
    return tuple(dict.fromkeys((*own, *(sampling.stop_token_ids or ()))))


def constraints(
    sampling: Any,  # noqa: ANN401
    admitted: Admitted,
) -> Constraints:
    """What an admitted request changes in the distribution of its canvases.

    Args:
        sampling: vLLM's ``SamplingParams``, completed with the model's and the tokenizer's ids.
        admitted: what else it asks for.
    """
    allowed = sampling.logprob_token_ids if admitted.constrained else sampling.allowed_token_ids
    until = dict.fromkeys(sampling.all_stop_token_ids, sampling.min_tokens)
    if admitted.pinned:
        # An answer that stops before its last pin would lack it.
        ending = {*(sampling.stop_token_ids or ()), sampling.eos_token_id} - {None}
        behind = max(admitted.pinned) + 1
        until |= {token: max(behind, until.get(token, 0)) for token in ending}
    bad_words = tuple(tuple(word) for word in sampling.bad_words_token_ids or ())
    if sampling.structured_outputs is not None:
        # Words are repaired where a canvas ends, which knows nothing of its constraint. Those of
        # one token, and there are no others, are tokens that never stand anywhere.
        until |= {word[0]: _ALWAYS for word in bad_words}
        bad_words = ()
    return Constraints(
        temperature=0.0 if is_greedy(sampling) else sampling.temperature,
        min_p=sampling.min_p,
        # Above every vocabulary it keeps all ids, and a tensor of 64 bits does not hold any number.
        top_k=min(max(0, sampling.top_k), _ALWAYS),
        top_p=sampling.top_p,
        allowed=tuple(dict.fromkeys(allowed or ())),
        bias=tuple((int(token), float(b)) for token, b in (sampling.logit_bias or {}).items()),
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        early=tuple(sorted((token, last) for token, last in until.items() if last > 0)),
        bad_words=bad_words,
        seed_canvas=admitted.seed_canvas,
        pinned=admitted.pinned,
        holes=admitted.holes,
    )
