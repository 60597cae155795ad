"""Engines of families whose text is not causal, held to a dense reference of the family's own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams

from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm import LLM
    from vllm.outputs import RequestOutput

    from vllm_diffusion.testing.dense_reveal import Answer

MARGIN = 3e-4
"""Largest difference of log-probabilities in fp32. Measured: up to 1.3e-4 between engine and dense
loop, and as much between the dense loop in fp32 and in fp64."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and how much may be said."""

    prompt: tuple[int, ...]
    length: int


def prompt_of(length: int, seed: int, *, vocab: int, special: int) -> tuple[int, ...]:
    """Random ids behind the special ones."""
    rng = random.Random(seed)
    return tuple(rng.randrange(special, vocab) for _ in range(length))


def ask(llm: LLM, requests: Sequence[Asked], **sampling: Any) -> list[RequestOutput]:
    """Greedy answers of full length, all asked for at once."""
    extra = sampling.pop("extra_args", None)
    parameters = [
        SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True, "max_tokens": each.length, **sampling},
            # Admission adds to it.
            extra_args=None if extra is None else dict(extra),
        )
        for each in requests
    ]
    prompts = [{"prompt_token_ids": list(each.prompt)} for each in requests]
    return llm.generate(prompts, parameters, use_tqdm=False)


def by_draw(seed: int) -> Callable[[int, int, float], float]:
    """Who is revealed first where a request of this seed asks for `random`, for the reference."""
    key = torch.tensor(split_seed(seed))

    def surer(step: int, place: int, _score: float) -> float:
        words = philox(key, torch.tensor(place), torch.tensor(step), Purpose.REVEAL)
        return float(uniform(words[0]))

    return surer


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """What was said."""
    return [list(each.outputs[0].token_ids) for each in outputs]


def assert_log_probs(outputs: Sequence[RequestOutput], wanted: Sequence[Answer]) -> None:
    """The log-probability of every token is that of the step which revealed it."""
    for output, each in zip(outputs, wanted, strict=True):
        said = output.outputs[0]
        pairs = zip(said.logprobs, said.token_ids, strict=True)
        found = [position[token].logprob for position, token in pairs]
        worst = max(abs(a - b) for a, b in zip(found, each.log_probs, strict=True))
        assert worst < MARGIN, f"log-probabilities differ by up to {worst}"
