"""CUDA graphs, simulated: a capture keeps every launch with its tensors, a replay repeats them.

What a replay reads and writes are the addresses of the capture. A buffer that a later step makes
anew is therefore missed, as on a GPU, and a wait inside a capture is an error, as on a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gpu_dry.meter import Meter, caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Launch(NamedTuple):
    """One entry of a captured graph; without `call` where there are only shapes."""

    operator: str
    kernels: int
    regions: list[str]
    call: Callable[[], object] | None = None
    out: object = None


class Machine:
    """The pretended device: whether it computes `values`, what it counts, what it captures."""

    def __init__(self, *, values: bool) -> None:
        self.values = values
        self.meter = Meter()
        self.tape: list[Launch] | None = None

    def wait(self, what: str) -> None:
        """The host waits for the device here."""
        if self.tape is not None:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {what} in {caller()}"
            )
        self.meter.waited(what)

    def launch(
        self,
        operator: str,
        kernels: int = 1,
        call: Callable[[], object] | None = None,
        out: object = None,
    ) -> None:
        """Work that was put on the stream and has been done: to be counted, or captured."""
        if self.tape is None:
            self.meter.launched(operator, kernels)
        elif kernels:
            self.tape.append(Launch(operator, kernels, list(self.meter.open), call, out))

    def replay(self, tape: list[Launch]) -> None:
        self.meter.replayed([one[:3] for one in tape if one.kernels])
        if self.values:
            with _disable_current_modes():
                for one in tape:
                    _repeat(one)


def _repeat(launch: Launch) -> None:
    assert launch.call is not None
    new = launch.call()
    for there, here in zip(pytree.tree_leaves(launch.out), pytree.tree_leaves(new), strict=False):
        if isinstance(there, torch.Tensor) and there.data_ptr() != here.data_ptr():
            there.copy_(here)


def graph_class(machine: Machine) -> tuple[type, Callable[..., Any]]:
    """`torch.cuda.CUDAGraph` and `torch.cuda.graph` of a machine."""

    class CUDAGraph:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.tape: list[Launch] = []

        def capture_begin(self, *_: Any, **__: Any) -> None:
            assert machine.tape is None, "a capture inside a capture"
            machine.tape = self.tape

        def capture_end(self) -> None:
            machine.tape = None

        def replay(self) -> None:
            machine.replay(self.tape)

        def reset(self) -> None:
            self.tape = []

        def pool(self) -> tuple[int, int]:
            return 0, 0

        def instantiate(self) -> None:
            pass

        def enable_debug_mode(self) -> None:
            pass

    @contextmanager
    def graph(captured: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
        captured.capture_begin()
        try:
            yield
        finally:
            captured.capture_end()

    return CUDAGraph, graph
