"""Mistakes put in on purpose, by name: what the tests must notice."""

from __future__ import annotations

from typing import Any


def plant(name: str | None) -> None:
    """Change the plugin's code; before an engine starts."""
    if name is not None:
        {
            "buffer made anew": _buffer_made_anew,
            "missing range": _missing_range,
            "wait on the hot path": _wait,
        }[name]()


def _buffer_made_anew() -> None:
    """The causal flags that a captured graph reads are at another address in every step."""
    import torch

    from vllm_diffusion.engine.step_attention import StepAttention

    original = StepAttention.metadata

    def metadata(self: Any, *args: Any, **options: Any) -> Any:
        self._causal = torch.zeros_like(self._causal)
        return original(self, *args, **options)

    StepAttention.metadata = metadata


def _missing_range() -> None:
    """Sliding layers get vLLM's own masks, which hide the prefix from late canvas rows."""
    from vllm_diffusion.engine.attention.gpu import BlockLocalMask

    BlockLocalMask.set_canvas_ranges = lambda *_: None


def _wait() -> None:
    """A step asks the device for a number."""
    from vllm_diffusion.engine.sampler import CanvasSampler

    original = CanvasSampler.__call__

    def call(self: Any, hidden: Any, *args: Any, **options: Any) -> Any:
        int(self.pool.step.sum())
        return original(self, hidden, *args, **options)

    CanvasSampler.__call__ = call
