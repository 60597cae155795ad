"""Segments on CPU_ATTN: the stock paged kernel, called once per window in the batch.

The kernel takes a causal flag per sequence and one symmetric window per call: row q sees keys k
with |q - k| < window. On a layer with window W all rows of a canvas must see the same prefix
instead. Three cases:

    end <= W             the window covers everything: same call as the causal rows
    prefix <= W - 1      everything is visible: one sequence, no window
    prefix > W - 1       each row becomes a sequence of one row that ends after the canvas, with
                         window W - 1 + canvas: exactly the last W - 1 prefix positions and the
                         canvas

An image longer than the window also needs the last form, see ``_beyond_window``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_diffusion.engine.attention.segments import Segment, Visibility

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_NO_WINDOW = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """One call of the paged kernel over some of the batch's rows."""

    rows: slice | Tensor  # rows of the batch; a slice if they are consecutive
    query_start_loc: Tensor  # [n + 1] int32
    seq_lens: Tensor  # [n] int32
    block_table: Tensor  # [n, blocks] int32
    dynamic_causal: Tensor | None  # [n] int32, None if all sequences are of one kind
    causal: bool
    window: int
    scheduler_metadata: Tensor


@dataclass
class SegmentedMetadata(CPUAttentionMetadata):
    """CPU_ATTN's metadata of one step, plus the kernel calls that our implementation makes."""

    calls: tuple[KernelCall, ...] = ()


class CanvasCPUAttentionBackend(CPUAttentionBackend):
    """CPU_ATTN with support for segments."""

    @staticmethod
    def get_impl_cls() -> type[CanvasCPUAttentionImpl]:
        """The implementation below; metadata builder and KV cache stay vLLM's."""
        return CanvasCPUAttentionImpl


class CanvasCPUAttentionImpl(CPUAttentionBackendImpl):
    """Runs a batch's kernel calls; a batch without segments goes to vLLM's implementation."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See ``CPUAttentionBackendImpl.forward``."""
        if not isinstance(attn_metadata, SegmentedMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        blocks, heads, block_size, _ = kv_cache.size()
        key_cache, value_cache = kv_cache.view(blocks, heads, block_size * 2, -1).chunk(2, dim=2)
        for call in attn_metadata.calls:
            in_place = isinstance(call.rows, slice)
            part = output[call.rows] if in_place else torch.empty_like(output[call.rows])
            ops.cpu_attention_with_kv_cache(
                query=query[call.rows],
                key_cache=key_cache,
                value_cache=value_cache,
                output=part,
                query_start_loc=call.query_start_loc,
                seq_lens=call.seq_lens,
                scale=self.scale,
                causal=call.causal,
                alibi_slopes=self.alibi_slopes,
                sliding_window=call.window,
                block_table=call.block_table,
                softcap=self.logits_soft_cap,
                scheduler_metadata=call.scheduler_metadata,
                s_aux=self.sinks,
                dynamic_causal=call.dynamic_causal,
                k_scale=layer._k_scale_float,  # noqa: SLF001 - how every backend of vLLM reads it
                v_scale=layer._v_scale_float,  # noqa: SLF001
                kv_cache_dtype=self.kv_cache_dtype,
            )
            if not in_place:
                output[call.rows] = part
        return output


def segmented_metadata(
    segments: Sequence[Segment],
    *,
    builder: CPUAttentionMetadataBuilder,
    block_table: Tensor,
    slot_mapping: Tensor,
    num_tokens: int,
) -> SegmentedMetadata:
    """The kernel calls of one attention group.

    Args:
        segments: all rows of the step, in row order.
        builder: the group's metadata builder; provides heads, window, dtype and instruction set.
        block_table: [requests, blocks] int32.
        slot_mapping: [tokens] int64.
        num_tokens: rows of the step.
    """
    window = builder.window_size
    calls = [
        _kernel_call(part, call_window, builder, block_table)
        for call_window, part in _by_window(segments, window)
    ]
    query_lens = [segment.length for segment in segments]
    ends = torch.tensor([segment.end for segment in segments], dtype=torch.int32)
    return SegmentedMetadata(
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        query_start_loc=_offsets(query_lens),
        max_seq_len=int(ends.max()),
        seq_lens=ends,
        block_table=block_table,
        slot_mapping=slot_mapping,
        scheduler_metadata=None,
        calls=tuple(calls),
    )


def _by_window(
    segments: Sequence[Segment], window: int
) -> list[tuple[int, list[tuple[Segment, bool]]]]:
    """Segments grouped by the window of their call, in the order of the calls.

    The flag means one sequence per row.
    """
    groups: dict[tuple[int, bool], list[Segment]] = defaultdict(list)
    corrections: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        prefix = segment.end - segment.length
        if segment.visibility is not Visibility.CANVAS or not 0 < window < segment.end:
            groups[window, False].append(segment)
        elif prefix < window:
            groups[_NO_WINDOW, False].append(segment)
        else:
            groups[window - 1 + segment.length, True].append(segment)
        if segment.visibility is Visibility.SPAN and 0 < window < segment.end - segment.span_start:
            for call_window, rows in _beyond_window(segment, window):
                corrections[call_window].append(rows)
    return [
        (call_window, [(segment, by_row) for segment in part])
        for (call_window, by_row), part in groups.items()
    ] + [
        (call_window, [(segment, True) for segment in part])
        for call_window, part in corrections.items()
    ]


def _beyond_window(span: Segment, window: int) -> Iterator[tuple[int, Segment]]:
    """The rows of an image longer than the window that do not see all of it through the window.

    Row q must see [min(q - W + 1, first), end). Rows for which the layer's window covers that are
    correct after the ordinary call. The others run again, one sequence per row, with a window that
    reaches back from the end of the image.
    """
    start = span.end - span.length

    def rows(first: int, behind: int) -> Segment:
        return replace(span, start=span.start + first - start, length=behind - first)

    late = max(start, span.span_start + window)
    if late < span.end:
        yield span.end - span.span_start, rows(late, span.end)
    for early in range(start, min(late, span.end - window)):
        yield span.end - (early - window + 1), rows(early, early + 1)


def _kernel_call(
    part: Sequence[tuple[Segment, bool]],
    window: int,
    builder: CPUAttentionMetadataBuilder,
    block_table: Tensor,
) -> KernelCall:
    lengths: list[int] = []
    ends: list[int] = []
    requests: list[int] = []
    causal: list[int] = []
    for segment, by_row in part:
        copies, length = (segment.length, 1) if by_row else (1, segment.length)
        lengths += [length] * copies
        ends += [segment.end] * copies
        requests += [segment.request] * copies
        causal += [int(segment.visibility is Visibility.CAUSAL)] * copies
    mixed = len(set(causal)) > 1
    query_start_loc = _offsets(lengths)
    seq_lens = torch.tensor(ends, dtype=torch.int32)
    dynamic_causal = torch.tensor(causal, dtype=torch.int32) if mixed else None
    all_causal = bool(causal[0]) and not mixed
    return KernelCall(
        rows=_rows([segment for segment, _ in part]),
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table[requests],
        dynamic_causal=dynamic_causal,
        causal=all_causal,
        window=window,
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=builder.num_heads,
            num_kv_heads=builder.num_kv_heads,
            head_dim=builder.head_dim,
            seq_lens=seq_lens,
            dtype=builder.dtype,
            query_start_loc=query_start_loc,
            causal=all_causal,
            sliding_window_size=window,
            isa=builder.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=dynamic_causal,
            kv_cache_dtype=builder.kv_cache_dtype,
        ),
    )


def _offsets(lengths: Sequence[int]) -> Tensor:
    """[0, l0, l0 + l1, ...] int32."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=offsets[1:])
    return offsets


def _rows(segments: Sequence[Segment]) -> slice | Tensor:
    """The segments' rows; a slice if they are consecutive, which avoids a copy."""
    start, stop = segments[0].start, segments[0].start
    for segment in segments:
        if segment.start != stop:
            return torch.cat(
                [torch.arange(s.start, s.start + s.length, dtype=torch.int64) for s in segments]
            )
        stop = segment.start + segment.length
    return slice(start, stop)
