"""The rows of a forward as attention sequences for GPU backends.

A sequence is causal, or its rows see all of it. Every layer writes the keys of all rows before any
row attends, so where a request is several sequences over one block table, each sees those before.

    causal text        a request is one sequence, a canvas's or causal. Where a finished canvas is
                       committed beside its successor it is two. The host knows how many rows are
                       text and how many are canvas; only the device knows whether a canvas's rows
                       are being committed instead, and where a request ends
    text on a grid     no sequence is causal. A request is as many as its rows have blocks: one in a
                       denoising step, one a block in a step of its prompt. The host knows positions
    text as a whole    a request is one sequence, and none is causal
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_diffusion.engine.attention.ranges import form_for, of_one_shape
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


_TRITON, _FLASH = "TRITON_ATTN", "FLASH_ATTN"
_FLASH_VERSIONS = 2, 4

_ALIGNED: Final = 4
"""A column begins at 16 bytes; for an address that does not, Triton compiles a kernel anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Sequences on the host, [P] int32 each, in row order."""

    request: np.ndarray
    """Request of each sequence."""
    rows: np.ndarray
    """Number of rows."""
    behind: np.ndarray
    """Number of rows of the request after them."""
    text: np.ndarray | None = None
    """1 for text rows, 0 for canvas rows that may be the commit of a finished canvas, -1 for canvas
    rows that may not; None where no sequence is causal."""


def parts_of(rows: np.ndarray, canvas: np.ndarray, *, foreseen: bool = False) -> Parts:
    """Split every request's rows into text rows and canvas rows after them.

    Args:
        rows: [R], rows of each request.
        canvas: [R], number of canvas rows, the last ones.
        foreseen: whether rows before the canvas rows may be the canvas itself, if its slot is not
            committing; the rows after them are then padding, see ``engine.fusion``.
    """
    both = np.stack((rows - canvas, canvas), axis=1).astype(np.int32)
    behind = np.stack((canvas, np.zeros_like(canvas)), axis=1).astype(np.int32)
    taken = both > 0
    request, kind = np.nonzero(taken)
    text = kind == 0
    if foreseen:
        text = np.where((rows > canvas)[request] & (canvas > 0)[request], -kind, text)
    return Parts(
        request=request.astype(np.int32),
        rows=both[taken],
        behind=behind[taken],
        text=text.astype(np.int32),
    )


def blocks_of(computed: np.ndarray, rows: np.ndarray, block: int) -> Parts | None:
    """Split every request's rows at the points of a grid; None if no request has rows on two sides.

    Args:
        computed: [R], positions before each request's rows.
        rows: [R], rows of each request, at least one.
        block: positions from one point of the grid to the next.
    """
    ends = computed + rows
    first = computed // block
    pieces = (ends - 1) // block - first + 1
    if (pieces == 1).all():
        return None
    request = np.repeat(np.arange(rows.shape[0], dtype=np.int32), pieces)
    within = np.arange(request.shape[0]) - np.repeat(pieces.cumsum() - pieces, pieces)
    begin = (first[request] + within) * block
    end = np.minimum(begin + block, ends[request])
    return Parts(
        request=request,
        rows=(end - np.maximum(begin, computed[request])).astype(np.int32),
        behind=(ends[request] - end).astype(np.int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A step's N sequences, as ``build_attn_metadata`` and ``BlockLocalMask`` read them."""

    starts: Tensor  # [N + 1] int32, first row of each
    starts_on_host: Tensor
    longest: int  # most rows of any
    lens: Tensor  # [N] int32, lengths
    lens_at_most: Tensor  # [N] int32, upper bounds of the lengths, on the host
    causal: Tensor | bool  # [N] int32, or one answer for all
    block_tables: tuple[Tensor, ...]  # one per cache group, [N, blocks] int32
    spans: list[list[tuple[int, int]]]  # images, see ``plan_segments``


def require_many_sequences(layers: Mapping[str, Any], text: Text) -> None:
    """Raise `ConfigError` unless every layer takes the sequences of text that is not causal.

    FLASHINFER keeps pages for as many sequences as there may be requests, and FlashAttention 3 a
    schedule for as many if it runs in FULL graphs; on a grid a prompt alone is one a block.
    FLEX_ATTENTION and the others are untried.

    Args:
        layers: the model's attention layers by name.
        text: of the family.
    """
    for attention in layers.values():
        backend, accepted = attention.get_attn_backend().get_name(), {_TRITON, _FLASH}
        if backend == _FLASH and text is Text.BLOCK:
            version = attention.impl.vllm_flash_attn_version
            backend = f"{_FLASH} {version}"
            accepted = {_TRITON, *(f"{_FLASH} {taken}" for taken in _FLASH_VERSIONS)}
        if backend not in accepted:
            raise ConfigError(
                f"attention backend {backend} is not supported for a model whose text is not "
                f"causal; accepted on a GPU are {' and '.join(sorted(accepted))}: start with "
                f"--attention-backend {_TRITON}."
            )


def sequences_of(
    batch: Any,
    parts: Parts | None,
    *,
    count: int,
    phase: Tensor,
    causal: Tensor,
    block_tables: tuple[Tensor, ...],
    spans: Sequence[list[tuple[int, int]]],
) -> Sequences:
    """The sequences of a batch whose text is causal.

    If each is a whole request, every tensor is the runner's own, at the address that a captured
    graph reads; ``causal`` always is. A batch with more sequences is never a graph: all requests
    of a graph have as many rows as a canvas.

    Args:
        batch: the runner's ``InputBatch``.
        parts: how its requests are split; None if each is one sequence in its slot's phase.
        count: N if each request is one sequence, including padding sequences.
        phase: [slots] bool, the next rows of a slot are causal.
        causal: int32, its first N elements are written; twice as long as most requests.
        block_tables: one per cache group, [N, blocks] int32.
        spans: images of every request.
    """
    form = form_for(causal.device)
    if parts is None or parts.request.shape[0] == len(spans):
        text = None
        if parts is not None:
            text = async_tensor_h2d(parts.text, device=causal.device)
        form.mark_sequences(phase, batch.idx_mapping, causal[:count], text=text)
        return _whole_requests(batch, count, causal[:count], block_tables, spans)
    assert parts.text is not None
    starts, request, behind, text = _sent(parts, parts.behind, parts.text, device=causal.device)
    lens, flags = torch.empty_like(request), causal[: request.shape[0]]
    form.mark_parts(phase, batch.idx_mapping, batch.seq_lens, request, behind, text, flags, lens)
    return _cut_requests(batch, parts, starts, request, lens, flags, block_tables, spans)


def sequences_without_causality(
    batch: Any,
    parts: Parts | None,
    *,
    count: int,
    block_tables: tuple[Tensor, ...],
) -> Sequences:
    """The sequences of a batch in which every row sees all of its sequence.

    Where each is a whole request, every tensor is the runner's own, as in ``sequences_of``.

    Args:
        batch: the runner's ``InputBatch``; its lengths on the host are exact.
        parts: how its requests are split, see ``blocks_of``; None if each is one sequence.
        count: N if each request is one sequence, including padding sequences.
        block_tables: one per cache group, [N, blocks] int32.
    """
    if parts is None:
        return _whole_requests(batch, count, False, block_tables, ())
    ends = batch.seq_lens_cpu_upper_bound.numpy()[parts.request] - parts.behind
    starts, request, lens = _sent(parts, ends, device=batch.seq_lens.device)
    return _cut_requests(batch, parts, starts, request, lens, False, block_tables, ())


def _whole_requests(
    batch: Any,
    count: int,
    causal: Tensor | bool,
    block_tables: tuple[Tensor, ...],
    spans: Sequence[list[tuple[int, int]]],
) -> Sequences:
    return Sequences(
        starts=batch.query_start_loc[: count + 1],
        starts_on_host=torch.from_numpy(batch.query_start_loc_np[: count + 1]),
        longest=int(batch.num_scheduled_tokens.max()),
        lens=batch.seq_lens[:count],
        lens_at_most=batch.seq_lens_cpu_upper_bound[:count],
        causal=causal,
        block_tables=block_tables,
        spans=list(spans),
    )


def _sent(parts: Parts, *more: np.ndarray, device: torch.device) -> list[Tensor]:
    """First rows [P + 1], requests [P] and more numbers [P] of the parts, int32, in one copy."""
    columns = (_starts(parts), parts.request, *more)
    places = [-(-column.shape[0] // _ALIGNED) * _ALIGNED for column in columns]
    together = np.zeros(sum(places), np.int32)
    for column, part in zip(columns, np.split(together, np.cumsum(places)[:-1]), strict=True):
        part[: column.shape[0]] = column
    sent = async_tensor_h2d(together, device=device).split(places)
    return [part[: column.shape[0]] for column, part in zip(columns, sent, strict=True)]


def _starts(parts: Parts) -> np.ndarray:
    starts = np.zeros(parts.rows.shape[0] + 1, np.int32)
    np.cumsum(parts.rows, out=starts[1:])
    return starts


def _cut_requests(
    batch: Any,
    parts: Parts,
    starts: Tensor,
    request: Tensor,
    lens: Tensor,
    causal: Tensor | bool,
    block_tables: tuple[Tensor, ...],
    spans: Sequence[list[tuple[int, int]]],
) -> Sequences:
    """One sequence a part; on the device [P + 1] first rows, and [P] requests and lengths."""
    tables = [table.new_empty(request.shape[0], table.shape[1]) for table in block_tables]
    for alike in of_one_shape(list(zip(block_tables, tables, strict=True))):
        form_for(request.device).gather_blocks(*zip(*alike, strict=True), rows=request)
    at_most = batch.seq_lens_cpu_upper_bound.numpy()[parts.request] - parts.behind
    return Sequences(
        starts=starts,
        starts_on_host=torch.from_numpy(_starts(parts)),
        longest=int(parts.rows.max()),
        lens=lens,
        lens_at_most=torch.from_numpy(at_most),
        causal=causal,
        block_tables=tuple(tables),
        spans=[spans[index] for index in parts.request] if spans else [],
    )
