"""Requests cut into sequences for GPU backends see what the segments of the CPU backend see."""

import types

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode

from vllm_diffusion.engine import step_attention
from vllm_diffusion.engine.attention.gpu import BlockLocalMask
from vllm_diffusion.engine.attention.segments import Visibility, plan_segments
from vllm_diffusion.engine.attention.sequences import parts_of, sequences_of
from vllm_diffusion.family import Text

pytestmark = pytest.mark.vllm

WINDOW, CANVAS, BLOCK, BLOCKS = 32, 16, 16, 20

# rows, canvas rows, positions behind the last row, the slot's phase is causal
PROMPT, CHUNK = (40, 0, 40, True), (20, 0, 90, True)
DENOISING, YOUNG = (CANVAS, CANVAS, 150, False), (CANVAS, CANVAS, CANVAS, False)
COMMITTING = (CANVAS, CANVAS, 120, True)
FUSED, EARLY = (2 * CANVAS, CANVAS, 200, False), (2 * CANVAS, CANVAS, 2 * CANVAS, False)
SHORT, ALONE = (5 + CANVAS, CANVAS, 77, False), (CANVAS, 0, 64, False)

BATCHES = {
    "fused-alone": [FUSED],
    "fused-and-all-others": [DENOISING, FUSED, PROMPT, COMMITTING, EARLY, CHUNK, YOUNG, SHORT],
    "commit-alone": [DENOISING, ALONE, COMMITTING],
    "commit-alone-beside-fused": [ALONE, FUSED],
}


def batch_of(requests):
    rows = np.array([r[0] for r in requests], np.int32)
    starts = np.concatenate(([0], rows.cumsum())).astype(np.int32)
    count = len(requests)
    slots = torch.arange(count).flip(0) + 1
    phase = torch.zeros(count + 2, dtype=torch.bool)
    phase[slots] = torch.tensor([r[3] for r in requests])
    lens = torch.tensor([r[2] for r in requests], dtype=torch.int32)
    batch = types.SimpleNamespace(
        num_scheduled_tokens=rows,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens + 7,
        idx_mapping=slots,
    )
    canvas = np.array([r[1] for r in requests], np.int32)
    tables = (1 + torch.arange(count * BLOCKS)).int().view(count, BLOCKS)
    return batch, canvas, phase, tables


def cut(requests):
    batch, canvas, phase, tables = batch_of(requests)
    causal = torch.full((2 * len(requests),), -9, dtype=torch.int32)
    sequences = sequences_of(
        batch,
        parts_of(batch.num_scheduled_tokens, canvas),
        count=len(requests),
        phase=phase,
        causal=causal,
        block_tables=(tables,),
        spans=[[(index, index + 1)] for index in range(len(requests))],
    )
    return batch, sequences, causal, tables


def expected(requests, window):
    """The definition: for every row the cells (block number, place) of the keys it sees."""
    batch, canvas, _, tables = batch_of(requests)
    segments = plan_segments(
        batch.query_start_loc_np.tolist(),
        batch.seq_lens.tolist(),
        [0 if causal else int(c) for c, (*_, causal) in zip(canvas, requests, strict=True)],
        [[] for _ in requests],
    )
    seen = []
    for segment in segments:
        start = segment.end - segment.length
        for row in range(start, segment.end):
            if segment.visibility is Visibility.CANVAS:
                keys = range(max(0, start - window + 1), segment.end)
            else:
                keys = range(max(0, row - window + 1), row + 1)
            table = tables[segment.request]
            seen.append({(int(table[key // BLOCK]), key % BLOCK) for key in keys})
    return seen


def shown(sequences, backend, window):
    """What the backend's kernel shows by the metadata that a sliding, or full, layer gets."""
    impl = types.SimpleNamespace(vllm_flash_attn_version=4, fa4_hd256=False)
    layer = types.SimpleNamespace(
        get_attn_backend=lambda: types.SimpleNamespace(get_name=lambda: backend),
        impl=impl,
        sliding_window=window,
        kv_cache=torch.empty(4, 2, BLOCK, 64),
    )
    mask = BlockLocalMask(
        {"a": layer},
        canvas_length=CANVAS,
        max_model_len=512,
        max_rows=16,
        max_tokens=256,
        device=torch.device("cpu"),
    )
    step = {
        "a": types.SimpleNamespace(
            num_actual_tokens=int(sequences.starts[-1]),
            max_query_len=sequences.longest,
            max_seq_len=512,
            query_start_loc=sequences.starts,
            seq_lens=sequences.lens,
            causal=sequences.causal,
            block_table=sequences.block_tables[0],
            mm_prefix_range_tensor=None,
            mm_prefix_query_range_tensor=None,
        )
    }
    mask.set_canvas_ranges(step)
    made, reach, seen = step["a"], window or 512, []
    for index, length in enumerate(made.seq_lens.tolist()):
        first, behind = sequences.starts[index : index + 2].tolist()
        causal = bool(made.causal if made.causal is True else made.causal[index])
        for flat in range(first, behind):
            row = length - (behind - flat)
            keys = {k for k in range(length) if causal and k <= row and row - k < reach}
            if window is None and not causal:
                keys = set(range(length))
            for ranges, of in (
                (made.mm_prefix_range_tensor, index),
                (made.mm_prefix_query_range_tensor, flat),
            ):
                if ranges is not None:
                    a, b = ranges[of].flatten().tolist()
                    keys |= set(range(a, b + 1)) if 0 <= a < b else set()
            table = made.block_table[index]
            seen.append({(int(table[key // BLOCK]), key % BLOCK) for key in keys})
    return seen


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize("window", [WINDOW, None])
def test_cut_requests_see_what_their_segments_see(name, backend, window):
    _, sequences, _, _ = cut(BATCHES[name])
    assert shown(sequences, backend, window) == expected(BATCHES[name], window or 512)


def test_a_cut_request_is_two_sequences_on_host_and_device():
    _, sequences, causal, tables = cut([DENOISING, FUSED])
    assert sequences.starts.tolist() == sequences.starts_on_host.tolist() == [0, 16, 32, 48]
    assert sequences.lens.tolist() == [150, 184, 200]
    assert sequences.lens_at_most.tolist() == [157, 191, 207]
    assert sequences.causal.tolist() == [0, 1, 0]
    assert sequences.longest == CANVAS
    assert sequences.spans == [[(0, 1)], [(1, 2)], [(1, 2)]]
    assert sequences.block_tables[0].tolist() == tables[[0, 1, 1]].tolist()
    assert sequences.causal.data_ptr() == causal.data_ptr()


def test_whether_a_canvas_is_committed_only_the_device_knows():
    """Its flag comes from the phase of its slot, also beside text."""
    requests = [(2 * CANVAS, CANVAS, 100, True)]
    assert cut(requests)[1].causal.tolist() == [1, 1]


def test_whole_requests_keep_what_a_graph_reads_where_it_is():
    batch, sequences, causal, tables = cut([DENOISING, ALONE, COMMITTING])
    assert sequences.causal.tolist() == [0, 1, 1]
    for ours, theirs in (
        (sequences.starts, batch.query_start_loc),
        (sequences.lens, batch.seq_lens),
        (sequences.causal, causal),
        (sequences.block_tables[0], tables),
    ):
        assert ours.data_ptr() == theirs.data_ptr()


def test_sequences_of_padding_are_canvases_of_no_row():
    batch, _, phase, tables = batch_of([COMMITTING])
    padded = torch.cat((batch.query_start_loc, batch.query_start_loc[-1:]))
    batch.query_start_loc, batch.query_start_loc_np = padded, padded.numpy()
    batch.seq_lens = torch.cat((batch.seq_lens, torch.zeros(1, dtype=torch.int32)))
    causal = torch.full((4,), -9, dtype=torch.int32)
    sequences = sequences_of(
        batch, None, count=2, phase=phase, causal=causal, block_tables=(tables,), spans=[[]]
    )
    assert causal.tolist() == [1, 0, -9, -9]
    assert sequences.lens.tolist() == [120, 0]


# ---- what the metadata is built with ----


@pytest.mark.parametrize(
    ("mode", "for_capture", "drafts", "flags"),
    [
        (CUDAGraphMode.NONE, True, 0, True),  # how vLLM asks for the metadata of a capture
        (CUDAGraphMode.FULL, False, 0, True),  # a commit alone, replayed as a graph
        (CUDAGraphMode.NONE, False, CANVAS, True),
        (CUDAGraphMode.PIECEWISE, False, 0, False),  # prompts
    ],
)
def test_who_reads_flags_gets_flags(monkeypatch, mode, for_capture, drafts, flags):
    batch, _, phase, tables = batch_of([DENOISING])
    vars(batch).update(
        num_reqs=1,
        num_reqs_after_padding=1,
        num_tokens=CANVAS,
        num_tokens_after_padding=CANVAS,
        num_draft_tokens=drafts,
        num_draft_tokens_per_req=None,
        req_ids=["a"],
    )
    attention = object.__new__(step_attention.StepAttention)
    vars(attention).update(
        _pool=types.SimpleNamespace(causal=phase, device=torch.device("cuda")),
        _family=types.SimpleNamespace(text=Text.CAUSAL),
        _max_model_len=512,
        _causal=torch.zeros(4, dtype=torch.int32),
        _fusion=types.SimpleNamespace(why_not=None),
        _block_local_mask=types.SimpleNamespace(set_canvas_ranges=lambda _: None),
    )
    built = []
    monkeypatch.setattr(step_attention, "build_attn_metadata", lambda **of: built.append(of))
    padded = mode == CUDAGraphMode.FULL
    attention.metadata(
        batch, (tables,), None, [], None, spans=[[]], padded=padded, for_capture=for_capture
    )
    (causal,) = (of["causal"] for of in built)
    assert isinstance(causal, torch.Tensor) if flags else causal is True
