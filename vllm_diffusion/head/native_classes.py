"""``classes.absorb`` in C++ for CPU hosts, and the order of ids that it reads a tile in.

See ``csrc/head/class_pass.h``: sixteen lanes side by side, a class a lane. What order that is
depends on the classes alone, so it is made once for them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.head.native import DTYPES, library
from vllm_diffusion.head.running_classes import RECORD

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.running_classes import RunningClasses

CHUNK: Final = 16  # VD_CHUNK, VD_SLOTS and VD_TILE of the headers
SLOTS: Final = 8192
_TILE: Final = 4096

WIDE: Final = 64
"""Ids of a tile from which on a class takes all lanes of a chunk."""

_KEPT: Final = 8  # sets of classes whose order is remembered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileOrder:
    """One tile's part of ``vd_class_tile``."""

    begin: Tensor  # [chunks + 1] int32, slots, counted from any origin
    place: Tensor  # [slots] uint16, columns of the tile
    lane: Tensor  # [chunks, CHUNK] int32
    wide: int


class TilePointers(ctypes.Structure):
    """``vd_class_tile``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("softcap", ctypes.c_float),
        ("temperature", ctypes.c_void_p),
        ("key0", ctypes.c_void_p),
        ("key1", ctypes.c_void_p),
        ("classes", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
        ("lane", ctypes.c_void_p),
    )


@lru_cache(maxsize=_KEPT)
def orders(class_of: Tensor, num_classes: int, first: int, count: int) -> tuple[TileOrder, ...]:
    """The order of every tile of the ids from ``first`` on; remembered for the tensor itself.

    Args:
        class_of: [V] int32, on the CPU; 0 for ids that are left out.
        num_classes: C.
        first: id that the first tile begins at.
        count: ids.
    """
    tiles = -(-count // _TILE)
    mine = class_of[first : first + count].long()
    # Runs of one class in one tile, their ids ascending.
    ids = mine.nonzero()[:, 0]
    key, order = (ids // _TILE * num_classes + mine[ids]).sort(stable=True)
    column = ids[order] % _TILE
    runs, length = torch.unique_consecutive(key, return_counts=True)
    tile, number = runs // num_classes, runs % num_classes
    start = length.cumsum(0) - length
    # Long runs first, each a chunk; the others sixteen to a chunk, longest first.
    rank = (tile * (_TILE + 1) + _TILE - length).argsort(stable=True)
    tile, number, length, start = tile[rank], number[rank], length[rank], start[rank]
    is_wide = length >= WIDE
    runs_of, wide_of = tile.bincount(minlength=tiles), tile[is_wide].bincount(minlength=tiles)
    place_in_tile = torch.arange(len(tile)) - (runs_of.cumsum(0) - runs_of)[tile]
    behind = place_in_tile - wide_of[tile]
    chunk_in_tile = torch.where(is_wide, place_in_tile, wide_of[tile] + behind // CHUNK)
    chunks_of = wide_of + (runs_of - wide_of + CHUNK - 1) // CHUNK
    edges = torch.nn.functional.pad(chunks_of.cumsum(0), (1, 0))
    chunk = edges[tile] + chunk_in_tile
    steps = torch.zeros(int(edges[-1]), dtype=torch.int64)
    needed = torch.where(is_wide, (length + CHUNK - 1) // CHUNK, length)
    steps.scatter_reduce_(0, chunk, needed, "amax")
    begin = torch.nn.functional.pad(steps.cumsum(0) * CHUNK, (1, 0))

    lane = torch.zeros(len(steps), CHUNK, dtype=torch.int32)
    within = torch.where(is_wide, 0, behind % CHUNK)
    lane[chunk, within] = number.int()
    lane[chunk[is_wide]] = number[is_wide, None].int()
    # Where every id goes: side by side in a wide chunk, else down its lane.
    run = torch.repeat_interleave(torch.arange(len(length)), length)
    nth = torch.arange(len(run)) - (length.cumsum(0) - length)[run]
    slot = begin[chunk[run]] + torch.where(is_wide[run], nth, nth * CHUNK + within[run])
    place = torch.full((int(begin[-1]),), _TILE, dtype=torch.int32)
    place[slot] = column[start[run] + nth].int()
    place, begin = place.to(torch.uint16), begin.int()
    found = []
    for index in range(tiles):
        low, high = int(edges[index]), int(edges[index + 1])
        begins = begin[low : high + 1]
        assert int(begins[-1] - begins[0]) <= SLOTS
        found.append(
            TileOrder(
                begin=begins,
                place=place[int(begins[0]) : int(begins[-1])],
                lane=lane[low:high],
                wide=int(wide_of[index]),
            )
        )
    return tuple(found)


def absorb(
    running: RunningClasses,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    key: tuple[Tensor, Tensor],
    order: TileOrder,
    isa: int | None = None,
) -> None:
    """See ``classes.absorb``.

    Args:
        first, softcap: as there.
        running: as ``RunningClasses.initial`` lays it out.
        logits: [R, n] fp32 or bf16, see ``native.fits``.
        temperature: [R] fp32, contiguous.
        key: two of [R] int64, contiguous.
        order: of this tile.
        isa: a place in ``native.ISAS``; None for the best this processor has.
    """
    compiled = library()
    assert compiled is not None
    assert running.best.stride(1) == RECORD
    assert temperature.is_contiguous()
    assert key[0].is_contiguous()
    assert key[1].is_contiguous()
    tile = TilePointers(
        values=logits.data_ptr(),
        rows=logits.shape[0],
        width=logits.shape[1],
        stride=logits.stride(0),
        first=first,
        dtype=DTYPES[logits.dtype],
        softcap=softcap or 0.0,
        temperature=temperature.data_ptr(),
        key0=key[0].data_ptr(),
        key1=key[1].data_ptr(),
        classes=running.best.shape[1],
        chunks=len(order.lane),
        wide=order.wide,
        begin=order.begin.data_ptr(),
        place=order.place.data_ptr(),
        lane=order.lane.data_ptr(),
    )
    chosen = compiled.vd_best_isa() if isa is None else isa
    status = compiled.vd_absorb_classes(
        ctypes.byref(tile),
        ctypes.c_void_p(running.best.data_ptr()),
        ctypes.c_int32(torch.get_num_threads()),
        ctypes.c_int32(chosen),
    )
    assert status == 0, f"{tuple(logits.shape)} logits, instruction set {chosen}"
