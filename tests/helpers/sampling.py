"""vLLM's SamplingParams without vLLM, and rules that are served."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from vllm_diffusion.denoise.constants import EntropyBoundConstants, ServedRules

RULE = EntropyBoundConstants(
    max_steps=48,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.005,
    stability_threshold=2,
)
FAST = replace(RULE, entropy_bound=0.5, t_max=0.6)
RULES = ServedRules(default=RULE, presets={"reference": RULE, "fast": FAST})

CONSTRAINT = SimpleNamespace(json="{}")
"""What stands for a constraint where nobody asks what it is."""


@dataclass(frozen=True)
class Sampling:
    """The attributes of vLLM's SamplingParams that ``request`` reads, at vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = field(default_factory=list)
    all_stop_token_ids: set[int] = field(default_factory=set)
    eos_token_id: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    allowed_token_ids: list[int] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: Any = None
    thinking_token_budget: int | None = None
    trace_decode_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
