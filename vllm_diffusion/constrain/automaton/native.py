"""``posterior.condition`` in C++ on the host: sparse, only the states that a row can meet.

The library is built with the package where there is a C++ compiler, see ``compiled`` and
``csrc/automaton``. A thread takes a canvas at a time and, for it, 24 bytes a row and state.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.compiled import load
from vllm_diffusion.constrain.automaton.record import Posterior

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

logger = logging.getLogger(f"vllm.{__name__}")


class AutomatonPointers(ctypes.Structure):
    """``vd_automaton``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("states", "classes", "sets")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("edge_first", "edge_class", "edge_target"),
                *("pair_first", "pair_set", "pair_target"),
                *("set_first", "set_class", "distance"),
            )
        ),
    )


class CanvasPointers(ctypes.Structure):
    """``vd_canvases``."""

    _fields_ = (
        ("canvases", ctypes.c_int64),
        ("length", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("log_mass", "best_log_prob", "free", "start", "rows", "left", "uniforms"),
                *("marginal", "ended", "sample_class", "map_class", "map_state", "log_z"),
            )
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedEdges:
    """An automaton as the library reads it: parallel edges are one pair, which reads a set.

    Most pairs of states share their set with others (what may stand inside a string, say), so a
    row's mass of a set is summed once.
    """

    states: int
    classes: int
    edge_first: NDArray[np.int32]  # [N + 1]
    edge_class: NDArray[np.int32]  # [E]
    edge_target: NDArray[np.int32]  # [E]
    pair_first: NDArray[np.int32]  # [N + 1]
    pair_set: NDArray[np.int32]  # [P]
    pair_target: NDArray[np.int32]  # [P]
    set_first: NDArray[np.int32]  # [S + 1]
    set_class: NDArray[np.int32]  # the members of every set
    distance: NDArray[np.int32]  # [N]

    @staticmethod
    def of(automaton: TokenAutomaton) -> MergedEdges:
        """The edges of ``automaton``, merged."""
        source, symbol, target = automaton.source, automaton.symbol, automaton.target
        order = np.lexsort((symbol, target, source))
        source_of, target_of, reads = source[order], target[order], symbol[order]
        new = (np.diff(source_of, prepend=-1) != 0) | (np.diff(target_of, prepend=-1) != 0)
        pairs = np.flatnonzero(new)
        # The class ids of a set, as bytes, name it.
        names: dict[bytes, int] = {}
        bounds = [*pairs.tolist(), len(reads)]
        sets = [
            names.setdefault(reads[first:last].tobytes(), len(names))
            for first, last in pairwise(bounds)
        ]
        members = [np.frombuffer(name, np.int32) for name in names]
        states = np.arange(automaton.num_states + 1)
        return MergedEdges(
            states=automaton.num_states,
            classes=automaton.num_classes,
            edge_first=_int32(np.searchsorted(source, states)),
            edge_class=_int32(symbol),
            edge_target=_int32(target),
            pair_first=_int32(np.searchsorted(source_of[pairs], states)),
            pair_set=_int32(sets),
            pair_target=_int32(target_of[pairs]),
            set_first=_int32(np.cumsum([0, *map(len, members)])),
            set_class=_int32(np.concatenate([np.empty(0, np.int32), *members])),
            distance=_int32(automaton.distance),
        )

    def pointers(self) -> AutomatonPointers:
        """What chain.h calls an automaton, good as long as this lives."""
        return AutomatonPointers(
            states=self.states,
            classes=self.classes,
            sets=len(self.set_first) - 1,
            edge_first=self.edge_first.ctypes.data,
            edge_class=self.edge_class.ctypes.data,
            edge_target=self.edge_target.ctypes.data,
            pair_first=self.pair_first.ctypes.data,
            pair_set=self.pair_set.ctypes.data,
            pair_target=self.pair_target.ctypes.data,
            set_first=self.set_first.ctypes.data,
            set_class=self.set_class.ctypes.data,
            distance=self.distance.ctypes.data,
        )


def condition(
    *,
    merged: MergedEdges,
    log_mass: Tensor,
    best_log_prob: Tensor,
    free: Tensor,
    start: Tensor,
    rows: Tensor,
    left: Tensor,
    uniforms: Tensor,
) -> Posterior:
    """See ``posterior.condition``; all tensors are on the CPU."""
    compiled = library()
    assert compiled is not None
    numbers = {
        "log_mass": log_mass,
        "best_log_prob": best_log_prob,
        "free": free,
        "uniforms": uniforms,
    }
    states = {"start": start, "rows": rows, "left": left}
    read = {
        **{name: values.to(torch.float32).contiguous() for name, values in numbers.items()},
        **{name: values.to(torch.int64).contiguous() for name, values in states.items()},
    }
    ids = partial(torch.empty, free.shape, dtype=torch.int64)
    posterior = Posterior(
        marginal=torch.empty(log_mass.shape),
        ended=torch.empty(free.shape),
        sample_class=ids(),
        map_class=ids(),
        map_state=ids(),
        log_z=torch.empty(len(free), dtype=torch.float64),
    )
    canvases = CanvasPointers(
        canvases=free.shape[0],
        length=free.shape[1],
        **{name: values.data_ptr() for name, values in read.items()},
        marginal=posterior.marginal.data_ptr(),
        ended=posterior.ended.data_ptr(),
        sample_class=posterior.sample_class.data_ptr(),
        map_class=posterior.map_class.data_ptr(),
        map_state=posterior.map_state.data_ptr(),
        log_z=posterior.log_z.data_ptr(),
    )
    automaton = merged.pointers()
    status = compiled.vd_condition(
        ctypes.byref(automaton), ctypes.byref(canvases), torch.get_num_threads()
    )
    assert status == 0, f"{merged.states} states, start {start.tolist()}"
    return posterior


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None, with one line in the log, where there is none."""
    part = "structured output"
    compiled = load(Path(__file__).parent, "_chain", part=part, logger=logger)
    if compiled is None:
        return None
    compiled.vd_condition.argtypes = (
        ctypes.POINTER(AutomatonPointers),
        ctypes.POINTER(CanvasPointers),
        ctypes.c_int32,
    )
    return compiled


def _int32(values: NDArray[np.generic] | list[int]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32)
