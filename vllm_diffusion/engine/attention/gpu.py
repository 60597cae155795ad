"""Block-local attention on GPU backends: every canvas row sees the same keys.

On a layer with window W, the rows of a canvas at positions [L, L + C) all see the keys
[max(0, L - W + 1), L + C). Causal rows see the last W keys, and all of their image if they are part
of one. vLLM applies a sliding window per row to a non-causal sequence, but its kernels also support
the mask "(causal and window) or range": a canvas is a range.

    TRITON_ATTN   takes a list of ranges per sequence. A second mask, over V, ignores ranges: it
                  zeroes values SLIDING_WINDOW or further from the first row of a query block. The
                  layers therefore get a SLIDING_WINDOW of W + C - 1, more than the distance of any
                  visible pair, and W goes into ``chunk_lookback``, which replaces the window in the
                  mask over scores: with chunks of one key it allows keys up to W - 1 back. Ranges
                  clamped to the wider window lose nothing, and let the kernel skip unseen tiles.
    FLASH_ATTN    FlashAttention 4 takes one range per row, and only in a batch that is causal as a
                  whole; canvas rows are non-causal only through their range. Its mask visits every
                  key, so each sequence is cut at the first block that any of its rows sees;
                  otherwise a long prompt would cost as much as on a full layer.

Takes the metadata of ``build_attn_metadata`` and returns metadata for the stock kernels. Never
syncs with the device, never writes into metadata that another layer may share, and keeps tensors
that captured graphs read at fixed addresses.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from vllm_diffusion.engine.attention.ranges import (
    NO_RANGE,
    first_seen,
    form_for,
    of_one_shape,
    sequence_of_rows,
)
from vllm_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch import Tensor

_TRITON, _FLASH, _CPU = "TRITON_ATTN", "FLASH_ATTN", "CPU_ATTN"
FLASH_VERSION = 4


def needs_block_local(max_model_len: int, window: int | None) -> bool:
    """Whether a window can ever hide a key from a canvas row.

    No canvas extends beyond ``max_model_len``, so a window at least that wide hides nothing and
    vLLM's own masks are exact.
    """
    return window is not None and window < max_model_len


def supports_block_local(backend: str, fa_version: int | None = None) -> bool:
    """Whether a backend can show all rows of a canvas the same keys on a sliding layer.

    Args:
        backend: vLLM's name of the backend, such as "TRITON_ATTN".
        fa_version: the layer's FlashAttention version under FLASH_ATTN; 2 and 3 take neither a mask
            function nor causal flags. None for other backends, and for version 4's separate kernel
            for heads of 256 on Blackwell, to which vLLM never passes ranges.
    """
    return backend in {_TRITON, _CPU} or (backend == _FLASH and fa_version == FLASH_VERSION)


def require_block_local(
    backend: str, *, fa_version: int | None, window: int, max_model_len: int
) -> None:
    """Raise `ConfigError` unless every canvas row can see the whole prefix window.

    Args:
        backend: vLLM's name of the backend of a sliding layer.
        fa_version: see `supports_block_local`.
        window: the layer's W, in tokens, the row itself included.
        max_model_len: longest sequence served, in tokens.
    """
    if not needs_block_local(max_model_len, window) or supports_block_local(backend, fa_version):
        return
    got = backend
    if backend == _FLASH:
        got += f" (FlashAttention {fa_version or 'that takes no ranges'})"
    raise ConfigError(
        f"attention backend {got} cannot show all rows of a canvas the same {window - 1} positions "
        f"before it, which max_model_len {max_model_len} with a sliding window of {window} needs; "
        f"accepted are {_TRITON}, {_FLASH} with FlashAttention 4 on Hopper, and {_CPU}: start with "
        f"--attention-backend {_TRITON}, or with --max-model-len {window}."
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """Properties of a layer that its mask depends on."""

    attention: Any
    backend: str
    window: int | None
    """W, or None if no window can hide a key: a full layer, or a short max_model_len."""


@dataclass(slots=True)
class _View:
    """What FLASH_ATTN layers with the same window and block size read in a step."""

    ranges: Tensor  # [T, 2] int32
    lens: Tensor | None = None  # [N] int32; None, like first_blocks, if no blocks are skipped
    first_blocks: Tensor | None = None  # [N] int32
    block: int = 0  # keys per block
    width: int = 0  # blocks a sequence may need
    tables: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Block tables of cache groups [R, blocks], and the part their layers see [N, width]."""


class BlockLocalMask:
    """Prepares a model's attention layers once, and the metadata of each step.

    Args:
        layers: the model's attention layers by name, including those without a window.
        canvas_length: the widest canvas, C.
        max_model_len: longest sequence served, in tokens.
        max_rows: most sequences per step, padding included.
        max_tokens: most tokens per step, padding included.
        device: device of the step.
        max_span: most consecutive positions of one image; wider ones are cut, from 2W - 1 at least.

    Raises `ConfigError` if a sliding layer's backend cannot express the mask, or if the canvas is
    longer than the window.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        *,
        canvas_length: int,
        max_model_len: int,
        max_rows: int,
        max_tokens: int,
        device: torch.device,
        max_span: int = 0,
    ) -> None:
        self._layers: dict[str, _Layer] = {}
        for name, attention in layers.items():
            backend = attention.get_attn_backend().get_name()
            window = attention.sliding_window
            if needs_block_local(max_model_len, window):
                version = _flash_version(attention.impl) if backend == _FLASH else None
                require_block_local(
                    backend, fa_version=version, window=window, max_model_len=max_model_len
                )
                if backend == _TRITON:
                    _widen(attention, window, canvas_length, max_span)
            else:
                window = None
            self._layers[name] = _Layer(attention, backend, window)

        self._max_rows, self._max_tokens, self._device = max_rows, max_tokens, device
        self._form = form_for(device)
        self._kept: dict[tuple[Hashable, ...], Tensor] = {}

    def set_canvas_ranges(self, attn_metadata: dict[str, Any]) -> None:
        """Replace the metadata of ``build_attn_metadata`` by metadata with the canvases' ranges.

        Call right after it, in every step whose ``causal`` is a tensor, also before a capture. A
        batch known to hold only prompt rows is cheaper with ``causal=True`` and needs no call.
        Existing image ranges are kept.

        Args:
            attn_metadata: metadata by layer name; values are replaced, never modified. Layers
                unknown to this object are left alone. Fields read: ``causal`` [N] int32 with 0 for
                canvases, ``seq_lens`` [N] int32, ``query_start_loc`` [N + 1] int32, all on the
                device and the same for all layers; padding sequences have length 0.
        """
        made: dict[tuple[int, int | None], Any] = {}
        # Masks do not depend on the cache group; they are written once for all layers sharing them.
        views: dict[tuple[int | None, int], _View] = {}
        ranges: dict[int, Tensor] = {}
        for name, metadata in list(attn_metadata.items()):
            layer = self._layers.get(name)
            if layer is None or not isinstance(metadata.causal, torch.Tensor):
                continue
            # Layers share metadata by KV cache group, and a group may mix windows.
            key = id(metadata), layer.window
            if key not in made:
                made[key] = metadata
                if layer.backend == _TRITON and layer.window is not None:
                    if layer.window not in ranges:
                        ranges[layer.window] = self._sequence_ranges(metadata, layer.window)
                    made[key] = copy.copy(metadata)
                    made[key].mm_prefix_range_tensor = ranges[layer.window]
                # Without images a full layer is faster with its causal flags. With images it takes
                # ranges too, since version 4 ignores the images of a batch that has flags.
                elif layer.backend == _FLASH and (
                    layer.window is not None or metadata.mm_prefix_query_range_tensor is not None
                ):
                    block = _block_of(layer)
                    if (layer.window, block) not in views:
                        views[layer.window, block] = self._view(metadata, layer.window, block)
                    made[key] = self._seen_through(views[layer.window, block], metadata, name)
            attn_metadata[name] = made[key]
        for view in views.values():
            for alike in of_one_shape(view.tables):
                self._form.gather_blocks(*zip(*alike, strict=True), first=view.first_blocks)

    # ---- TRITON_ATTN: [N, ranges, 2], a pair that does not ascend is empty ----

    def _sequence_ranges(self, metadata: Any, window: int) -> Tensor:
        causal, starts, lens = _sequences(metadata)
        ranges = self._buffer("ranges", window, shape=(self._max_rows, 1, 2))[: lens.shape[0]]
        # The buffer is written first, so that a graph captured on it sees this step's canvases even
        # if running requests still carry the images of their prompts.
        self._form.write_sequence_ranges(causal, starts, lens, window, ranges)
        images = metadata.mm_prefix_range_tensor
        if images is None:
            return ranges
        # The kernel is compiled per number of ranges, so it is rounded up to a power of two.
        filler = _power_of_two(images.shape[1] + 1) - images.shape[1] - 1
        return functional.pad(torch.cat((ranges, images), dim=1), (0, 0, 0, filler))

    # ---- FLASH_ATTN: [T, 2], relative to the start of the view ----

    def _view(self, metadata: Any, window: int | None, block: int) -> _View:
        """Ranges of all rows, and the start of each sequence: the first block that it sees.

        Masks compare positions within one sequence, and cached keys carry their rotary embedding.
        So a sequence can drop its first blocks if length, block table and ranges all do.
        """
        causal, starts, lens = _sequences(metadata)
        kind, count = (window, block), lens.shape[0]
        ranges = self._buffer("rows", *kind, shape=(self._max_tokens, 2))
        view = _View(ranges[: metadata.num_actual_tokens], block=block)
        if window is not None and block:
            view.lens = self._buffer("lens", *kind, shape=(self._max_rows,))[:count]
            view.first_blocks = self._buffer("first", *kind, shape=(self._max_rows,))[:count]
        images = metadata.mm_prefix_query_range_tensor
        if images is not None or view.lens is None or view.first_blocks is None:
            self._write_with_images(view, metadata, window, block)
            view.width = metadata.block_table.shape[1]  # an image may begin long before its row
            return view
        assert window is not None
        longest = metadata.max_query_len
        self._form.write_row_ranges(
            causal,
            starts,
            lens,
            window,
            block,
            longest,
            view.ranges,
            view.lens,
            view.first_blocks,
        )
        seen = window - 1 + longest
        view.width = (seen + block - 1 + block - 1) // block
        return view

    def _write_with_images(
        self, view: _View, metadata: Any, window: int | None, block: int
    ) -> None:
        """The view of a step with images, or one that starts at the first key."""
        causal, starts, lens = _sequences(metadata)
        first = first_seen(starts, lens, window)
        sequence, padding = sequence_of_rows(starts, view.ranges.shape[0])
        bounds = torch.stack((first, lens - 1), dim=1)
        canvas_row = (causal == 0)[sequence] & ~padding
        ranges = torch.where(canvas_row[:, None], bounds[sequence], NO_RANGE)
        images = metadata.mm_prefix_query_range_tensor
        if images is not None:
            behind = ranges.shape[0] - images.shape[0]
            ranges = torch.maximum(ranges, functional.pad(images, (0, 0, 0, behind), value=-1))
        if view.lens is not None and view.first_blocks is not None:
            # An image may begin before the window of its first row in this step.
            begin = torch.where(ranges[:, 0] < 0, torch.iinfo(torch.int32).max, ranges[:, 0])
            first = first.scatter_reduce(0, sequence, begin, "amin")
            torch.div(first, block, rounding_mode="floor", out=view.first_blocks)
            skipped = view.first_blocks * block
            torch.sub(lens, skipped, out=view.lens)
            ranges = torch.where(ranges < 0, NO_RANGE, ranges - skipped[sequence][:, None])
        view.ranges.copy_(ranges)

    def _seen_through(self, view: _View, metadata: Any, name: str) -> Any:
        out = copy.copy(metadata)
        out.causal = True  # the ranges replace the flags
        out.mm_prefix_query_range_tensor = view.ranges
        if view.lens is None:
            return out
        table = metadata.block_table
        width = min(view.width, table.shape[1])
        shape = (self._max_rows, table.shape[1])
        out.seq_lens = view.lens
        out.block_table = self._buffer("table", name, shape=shape)[: view.lens.shape[0], :width]
        view.tables.append((table, out.block_table))
        out.max_seq_len = min(metadata.max_seq_len, width * view.block)
        return out

    def _buffer(self, *key: Hashable, shape: tuple[int, ...]) -> Tensor:
        """A tensor of zeros at a fixed address."""
        if key not in self._kept:
            self._kept[key] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._kept[key]


def _widen(attention: Any, window: int, canvas_length: int, max_span: int) -> None:
    """Pass a TRITON_ATTN layer its window as the lookback, so that V is masked further out.

    The kernel uses chunks of ``SLIDING_WINDOW // (lookback + 1)`` keys, which is one key as long as
    the wider window is below 2W. Hence canvases of at most W, and images cut from 2W - 1 on.
    """
    if canvas_length > window:
        raise ConfigError(
            f"a canvas of {canvas_length} tokens is longer than the sliding window of {window}, "
            f"which {_TRITON} cannot express; accepted are up to {window}: lower canvas_length."
        )
    reach = min(2 * window - 1, window - 1 + max(canvas_length, max_span))
    attention.impl.sliding_window = (reach - 1, 0)
    attention.impl.chunk_lookback = window - 1
    # Clamped to the reach, not the window: this clips nothing and lets the kernel skip tiles.
    attention.mm_prefix_clamp_sliding_window = True


def _flash_version(impl: Any) -> int | None:
    return None if impl.fa4_hd256 else impl.vllm_flash_attn_version


def _sequences(metadata: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Flags [N], first rows [N + 1] and lengths [N] of a step's sequences."""
    count = metadata.seq_lens.shape[0]
    return metadata.causal[:count], metadata.query_start_loc[: count + 1], metadata.seq_lens


def _block_of(layer: _Layer) -> int:
    """Keys per block of the layer's cache; 0 in a profiling run without a cache."""
    cache = layer.attention.kv_cache
    return cache.shape[2] if cache.dim() == len(("block", "head", "slot", "key and value")) else 0


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
