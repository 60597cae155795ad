"""What a step costs a GPU besides time: launches, kernels and waits, by the region they are in.

A launch is a call by the host that puts work on a stream, a kernel is one piece of that work: the
replay of a graph is one launch and as many kernels as were captured. A wait is a call that returns
only when the device, or a copy through memory it cannot reach by itself, has caught up.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Operators that only make memory or another view of it. Views are known by their schema.
_MAKES_MEMORY = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_same_size"),
    "weak_ref_tensor",
}
# Where eager CUDA runs more than one kernel for an operator: a copy first, or several passes.
_SEVERAL = {
    **dict.fromkeys(("masked_fill", "index_put", "scatter", "scatter_add", "index_fill"), 2),
    **dict.fromkeys(("topk", "nonzero", "repeat_interleave", "cumsum", "scatter_reduce"), 2),
    **dict.fromkeys(("sort", "argsort", "unique_dim", "_unique2", "multinomial"), 4),
    "index_add": 2,
    "roll": 1,
}


ADMISSION: Final = "admission"
"""The region in which a request is taken in."""


class Meter:
    """Counts while `watching`; `regions` nest, and everything counts in all that are open."""

    def __init__(self) -> None:
        self.watching = False
        self.open: list[str] = []
        self.launches: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.operators: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def clear(self) -> None:
        for counts in (self.launches, self.kernels, self.operators, self.waits, self.replays):
            counts.clear()
        self.calls.clear()

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()

    def launched(self, operator: str, kernels: int = 1) -> None:
        if self.watching and kernels:
            for region in {"all", *self.open}:
                self.launches[region] += kernels
            self.ran(operator, kernels, self.open)

    def ran(self, operator: str, kernels: int, regions: list[str]) -> None:
        """Kernels that no launch of the host stands for one by one."""
        for region in {"all", *regions}:
            self.kernels[region] += kernels
            self.operators.setdefault(region, Counter())[operator] += kernels

    def replayed(self, tape: list[tuple[str, int, list[str]]]) -> None:
        """A graph ran: of its kernels each counts where it was captured and where it is now."""
        if not self.watching:
            return
        for region in {"all", *self.open}:
            self.launches[region] += 1
            self.replays[region] += 1
        for operator, kernels, regions in tape:
            self.ran(operator, kernels, list({*regions, *self.open}))

    def waited(self, what: str) -> None:
        # What waits as a request comes in waits once a request, not in every step.
        if self.watching and ADMISSION not in self.open:
            self.waits[f"{what} in {caller()}"] += 1


def kernels_of(func: torch._ops.OpOverload, out: object) -> int:
    """How many kernels an operator is on a GPU."""
    name = func._schema.name.partition("::")[2]
    if name in _MAKES_MEMORY or _is_view(func):
        return 0
    results = list(out if isinstance(out, tuple | list) else [out])
    if results and all(isinstance(one, torch.Tensor) and not one.numel() for one in results):
        return 0
    return _SEVERAL.get(name, 1)


@functools.cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    shared = [one.alias_info for one in func._schema.returns]
    return bool(shared) and all(one is not None and not one.is_write for one in shared)


def caller() -> str:
    """The innermost line of the plugin, or else of vLLM, that is running."""
    frame, vllm = sys._getframe(1), ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "vllm_diffusion" in path.parts:
            below = path.parts[path.parts.index("vllm_diffusion") + 1 :]
            return f"{'/'.join(below)}:{frame.f_lineno}"
        if not vllm and "vllm" in path.parts:
            vllm = f"{'/'.join(path.parts[path.parts.index('vllm') :])}:{frame.f_lineno}"
        frame = frame.f_back
    return vllm or "?"


def measured(meter: Meter, owner: type, name: str, region: str) -> None:
    """Let calls of a method of `owner` be a region."""
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def inside(*args: Any, **options: Any) -> Any:
        if meter.watching:
            meter.calls[region] += 1
        with meter.region(region):
            return original(*args, **options)

    setattr(owner, name, inside)
