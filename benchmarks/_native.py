"""Native vLLM's DiffusionGemma with our noise, recorded step by step.

Takes the seed of one request; returns the input and the logits of every denoising step. Only the
random numbers are replaced; arithmetic and rule are native. One request at a time, on the CPU, with
the compiler off (TORCHDYNAMO_DISABLE=1), which would treat the injected numbers as constants.
"""
# ruff: noqa: ANN401 - wraps functions of vLLM, which are not followed by a type checker

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

import torch

from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an engine computed in one denoising step. L canvas length, V vocabulary."""

    start: int  # absolute position of the canvas
    canvas: Tensor  # [L] int64, input
    logits: Tensor  # [L, V] fp32


class NativeRecorder:
    """Watches vLLM's DiffusionSampler on one request and supplies its random numbers."""

    def __init__(self, seed: int) -> None:
        self.key = torch.tensor([split_seed(seed)])
        self.steps: list[Step] = []
        self._patches = ExitStack()
        self._start = 0
        self._step = 0
        self._new_canvas_at: int | None = None
        self._canvas: Tensor | None = None

    def __enter__(self) -> Self:
        from vllm.model_executor.models import diffusion_gemma as native

        for owner, name, wrapper in (
            (native.DiffusionSampler, "__call__", self._around_sampler),
            (native, "sample_row_stats_reference", self._around_statistics),
            (torch, "randint", self._around_randint),
        ):
            self._patches.enter_context(patch.object(owner, name, wrapper(getattr(owner, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _around_sampler(self, inner: Any) -> Any:
        def call(sampler: Any, logits: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
            states, slot = sampler.diffusion_states, int(batch.idx_mapping_np[0])
            end, width = int(batch.seq_lens[0]), int(batch.cu_num_logits_np[1])
            committing = bool(states.is_encoder_phase[slot])
            self._start, self._step = end - width, int(states.step[slot])
            # After a prompt and after a commit the next random tokens are a canvas behind it.
            self._new_canvas_at = end if committing else None
            self._canvas = None if committing else states.canvas[slot, :width].clone()
            return inner(sampler, logits, batch, *args, **kwargs)

        return call

    def _around_statistics(self, inner: Any) -> Any:
        def statistics(logits: Tensor, temps: Tensor, length: int, dtype: Any) -> Any:
            argmax, _, entropy, probs = inner(logits, temps, length, dtype)
            if self._canvas is not None:
                step = Step(start=self._start, canvas=self._canvas, logits=logits.clone())
                self.steps.append(step)
            rows = logits.shape[0]
            noise = Noise(
                seed=self.key.expand(rows, 2),
                position=self._start + torch.arange(rows),
                step=torch.full((rows,), self._step),
            )
            weight = (logits.float() / temps.repeat_interleave(length)[:, None]).softmax(-1)
            return argmax, sample_rows(weight, noise), entropy, probs

        return statistics

    def _around_randint(self, inner: Any) -> Any:
        def randint(low: int, high: int, size: tuple[int, ...], **kwargs: Any) -> Tensor:
            if len(size) != 2:
                drawn: Tensor = inner(low, high, size, **kwargs)
                return drawn
            offset = torch.arange(size[1])[None]
            if self._new_canvas_at is not None:
                return initial_canvas(self.key, self._new_canvas_at + offset, high)
            step = torch.tensor([self._step])
            return uniform_tokens(self.key, self._start + offset, step, high)

        return randint
