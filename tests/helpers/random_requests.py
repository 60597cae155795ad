"""Random requests that can be served: any mix of parameters, over chats that share beginnings.

Takes a `random.Random`: hypothesis's own, which shrinks what fails, or one with a seed, which draws
the same requests in every run. Gives prompts as token ids and `SamplingParams`; and `WAYS`, engines
that must answer them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.testing.tasks import TASKS, Item, make_item

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm import LLM, SamplingParams

STOP: Final = 500
"""An id that every request stops at, whatever else it asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Who shares a batch with whom, and in which pieces a prompt is computed."""

    seqs: int
    """Requests that run at once."""
    budget: int
    """Tokens of a step, canvases included; longer prompts are cut."""
    shuffled: bool
    """Whether requests arrive in another order than they were drawn in."""
    cached: bool
    """Whether beginnings that were computed before are taken from the prefix cache."""
    fused: bool
    """Whether a commit shares a forward with the next canvas."""

    @property
    def options(self) -> dict[str, Any]:
        """What an `LLM` is started with for it."""
        return {
            "max_num_seqs": self.seqs,
            "max_num_batched_tokens": self.budget,
            "enable_prefix_caching": self.cached,
            # A picture would have to fit into a step.
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "additional_config": {"diffusion": {"fused_commit": self.fused}},
        }


WAYS: Final = (
    Way(seqs=1, budget=2048, shuffled=False, cached=False, fused=False),
    Way(seqs=3, budget=256, shuffled=True, cached=True, fused=True),
    Way(seqs=16, budget=2048, shuffled=True, cached=True, fused=True),
)
"""Alone; three at once in small pieces; many at once."""

WORDS: Final = ("a", "the", "no", "x y")
IDS: Final = range(12, 61)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a drawn request must fit into."""

    canvas: int
    vocab: int
    max_steps: int | None = None
    """Most denoising steps a request may take; None for the served number."""
    reveals: bool = False
    """Of a model whose tokens are revealed for good, and whose text is not causal."""


def _one(*values: Any) -> Callable[[Random, Shape], Any]:
    return lambda dice, _: dice.choice(values)


def _some_ids(dice: Random, most: int) -> list[int]:
    return dice.sample(IDS, dice.randint(1, most))


def _bias(dice: Random, _: Shape) -> dict[int, float]:
    return {token: dice.choice((-100.0, -1.0, 3.0, 100.0)) for token in _some_ids(dice, 4)}


_SAMPLING: Final[Mapping[str, Callable[[Random, Shape], Any]]] = {
    "temperature": _one(0.0, 0.2, 0.5, 1.0, 1.7, 2.0),
    "top_p": _one(0.01, 0.3, 0.9, 1.0),
    "top_k": lambda dice, shape: dice.choice((-1, 1, 2, 17, shape.vocab)),
    "min_p": _one(0.0, 0.05, 0.6, 1.0),
    "presence_penalty": _one(-2.0, 0.5, 2.0),
    "frequency_penalty": _one(-2.0, 0.5, 2.0),
    "repetition_penalty": _one(0.5, 1.0, 1.3, 20.0),
    "logit_bias": _bias,
    "allowed_token_ids": lambda dice, _: _some_ids(dice, 12),
    "min_tokens": lambda dice, shape: dice.choice((3, shape.canvas, shape.canvas + 3)),
    "bad_words": lambda dice, _: dice.sample(WORDS, dice.randint(1, 3)),
    "stop": _one(["e"], ["}", "in "]),
    "logprobs": lambda dice, _: dice.randint(0, 4),
    "prompt_logprobs": lambda dice, _: dice.randint(0, 2),
    "n": _one(2),
    "max_tokens": lambda dice, shape: dice.choice(
        (1, shape.canvas - 3, shape.canvas, 2 * shape.canvas - 1)
    ),
    "ignore_eos": _one(True),
    "seed": lambda dice, _: dice.getrandbits(63),
}
_OPTIONS: Final[Mapping[str, Callable[[Random, Shape], Any]]] = {
    "max_steps": lambda dice, shape: dice.choice((1, 2, shape.max_steps or 7)),
    "canvas_length": lambda dice, shape: dice.choice((shape.canvas // 2, shape.canvas - 1)),
    "t_min": _one(0.0, 0.3),
    "t_max": _one(0.5, 1.5),
    "entropy_bound": _one(0.0, 0.5, 50.0),
    "confidence_threshold": _one(0.0, 0.1, 10.0),
    "stability_threshold": _one(0, 1),
    "pinned": lambda dice, shape: dice.sample(range(shape.canvas // 2 - 1), dice.randint(1, 3)),
    "preset": _one("reference", "balanced", "fast", "gentle"),
    "hold_threshold": _one(0.3, 0.9),
    "doubt_threshold": _one(0.2, 5.0),
    "soft_embedding_top_k": _one(8, 64),
    "noise_level": _one(0.3, 1.0),
    "fused_commit": _one(True, False),
    "telemetry": _one(True),
}

_REVEAL_OPTIONS: Final[Mapping[str, Callable[[Random, Shape], Any]]] = {
    "max_steps": lambda dice, shape: dice.choice((1, 2, shape.max_steps or 7)),
    "reveal_threshold": _one(0.01, 0.3, 0.9),
    "reveal_by": _one("drawn", "model", "margin"),
    "pinned": lambda dice, shape: dice.sample(range(shape.canvas // 2 - 1), dice.randint(1, 3)),
    "preset": _one("reference", "balanced", "fast", "gentle"),
    "noise_level": _one(0.3, 1.0),
    "fused_commit": _one(True, False),
    "telemetry": _one(True),
}

CONSTRAINTS: Final[tuple[Mapping[str, Any], ...]] = (
    {"choice": ["red", "green", "blue"]},
    {"regex": "[a-c]{2,40}( x)*"},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
)
"""Of which each has a text that fits into a canvas."""


def draw_sampling(dice: Random, shape: Shape, *, seed: int) -> SamplingParams:
    """A request that can be served: wishes that exclude each other are brought together.

    Args:
        dice: the source of every choice.
        shape: what it must fit into.
        seed: of the request, where the dice give none.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    drawn = _drawn(dice, shape, _SAMPLING)
    options = _drawn(dice, shape, _REVEAL_OPTIONS if shape.reveals else _OPTIONS)
    if shape.reveals:
        drawn.pop("prompt_logprobs", None)
    if dice.randrange(4) == 0:
        drawn["structured_outputs"] = StructuredOutputsParams(**dice.choice(CONSTRAINTS))
        for excluded in ("bad_words", "allowed_token_ids", "max_tokens"):
            drawn.pop(excluded, None)
        options.pop("pinned", None)
    width = options.get("canvas_length", shape.canvas)
    sampling = {"max_tokens": shape.canvas, "seed": seed, "stop_token_ids": [STOP]} | drawn
    if "pinned" in options:
        allowed = sampling.get("allowed_token_ids", [77, 78])
        options["seed_canvas"] = [allowed[at % len(allowed)] for at in range(width)]
        sampling["max_tokens"] = max(sampling["max_tokens"], max(options["pinned"]) + 1)
    elif "noise_level" in options:
        options["seed_canvas"] = [IDS[at % len(IDS)] for at in range(width)]
    sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
    if sampling.get("temperature") == 0.0:
        sampling.pop("n", None)  # vLLM: the best answer is one
    if shape.max_steps is not None:
        options.setdefault("max_steps", shape.max_steps)
    return SamplingParams(
        **sampling, extra_args={f"diffusion_{name}": value for name, value in options.items()}
    )


def _drawn(
    dice: Random, shape: Shape, choices: Mapping[str, Callable[[Random, Shape], Any]]
) -> dict[str, Any]:
    """Some of the choices, every third on average."""
    return {name: pick(dice, shape) for name, pick in choices.items() if dice.randrange(3) == 0}


def draw_prompt(dice: Random, tokenizer: Any, longest: int) -> list[int]:
    """Token ids of a chat that ends with a task, after some or none of the turns others have too.

    Args:
        dice: the source of every choice.
        tokenizer: with a chat template.
        longest: most token ids; older turns are left out until it fits.
    """
    task = dice.choice(list(TASKS))
    asked = make_item(task, dice, dice.choice(TASKS[task].sizes))
    earlier = list(_earlier(dice.randrange(4)))
    while True:
        messages = [
            {"role": role, "content": text}
            for item in earlier
            for role, text in (("user", item.prompt), ("assistant", item.answer))
        ]
        messages.append({"role": "user", "content": asked.prompt})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = list(prompt if isinstance(prompt, list) else prompt["input_ids"])
        if len(ids) <= longest or not earlier:
            return ids[:longest]
        earlier.pop()


@cache
def _earlier(story: int) -> tuple[Item, ...]:
    """Turns of one of a few conversations; story 0 has none, a later one more."""
    dice = Random(story)
    names = list(TASKS)
    return tuple(
        make_item(name, dice, TASKS[name].sizes[0]) for name in dice.choices(names, k=2 * story)
    )


def draw_requests(
    tokenizer: Any, shape: Shape, count: int, *, seed: int = 0, longest: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters, the same for the same seed; see `draw_prompt`, `draw_sampling`."""
    dice = Random(seed)
    drawn = [
        (draw_prompt(dice, tokenizer, longest), draw_sampling(dice, shape, seed=number))
        for number in range(count)
    ]
    return [prompt for prompt, _ in drawn], [sampling for _, sampling in drawn]


def tokens_of(
    llm: LLM, way: Way, prompts: Sequence[list[int]], asked: Sequence[SamplingParams]
) -> list[list[list[int]]]:
    """Token ids of all answers to every request, in the order they were drawn in."""
    order = list(range(len(prompts)))
    if way.shuffled:
        Random(way.seqs).shuffle(order)
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[number]} for number in order],
        [asked[number] for number in order],
        use_tqdm=False,
    )
    by_number = dict(zip(order, outputs, strict=True))
    return [
        [list(answer.token_ids) for answer in by_number[number].outputs]
        for number in range(len(prompts))
    ]
