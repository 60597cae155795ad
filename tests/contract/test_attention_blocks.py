"""Text that is not causal as sequences for GPU backends: blocks of a grid, and whole requests.

What they show is held to the segments that the CPU backend is given.
"""

import inspect
import types

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends import flash_attn

from vllm_diffusion.engine import step_attention
from vllm_diffusion.engine.attention import sequences as sequences_module
from vllm_diffusion.engine.attention.segments import plan_blocks
from vllm_diffusion.engine.attention.sequences import (
    blocks_of,
    require_many_sequences,
    sequences_without_causality,
)
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Text

pytestmark = pytest.mark.vllm

GRID, PAGE, PAGES = 4, 16, 8

# positions computed, rows
PROMPT, NEXT_CHUNK, BEHIND_HIT = (0, 11), (16, 9), (8, 4)
TAIL_AND_CANVAS, CANVAS, AT_THE_END, SHORT_PROMPT = (12, GRID), (40, GRID), (36, 3), (0, 3)
OLD_AND_NEW = (20, 2 * GRID)

CUT = {
    "prompts": [PROMPT, NEXT_CHUNK, BEHIND_HIT],
    "commit beside its successor": [CANVAS, OLD_AND_NEW, TAIL_AND_CANVAS],
    "all kinds": [AT_THE_END, PROMPT, CANVAS, OLD_AND_NEW, NEXT_CHUNK, SHORT_PROMPT],
}
WITHIN_BLOCKS = [TAIL_AND_CANVAS, CANVAS, AT_THE_END, SHORT_PROMPT]


def batch_of(requests):
    computed, rows = np.array(requests, np.int32).T
    starts = np.concatenate(([0], rows.cumsum())).astype(np.int32)
    lens = torch.from_numpy(computed + rows)
    batch = types.SimpleNamespace(
        num_computed_tokens_np=computed,
        num_scheduled_tokens=rows,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
    )
    tables = (1 + torch.arange(len(rows) * PAGES)).int().view(-1, PAGES)
    return batch, tables


def sequences_in(requests, *tables, block=GRID):
    batch, table = batch_of(requests)
    parts = None
    if block is not None:
        parts = blocks_of(batch.num_computed_tokens_np, batch.num_scheduled_tokens, block)
    made = sequences_without_causality(
        batch, parts, count=len(requests), block_tables=tables or (table,)
    )
    return batch, table, made


def expected(requests, block):
    """The definition: for every row the cells (page number, place) of the keys that it sees."""
    batch, table = batch_of(requests)
    starts, ends = batch.query_start_loc_np.tolist(), batch.seq_lens.tolist()
    return [
        {(int(table[s.request][key // PAGE]), key % PAGE) for key in range(s.end)}
        for s in plan_blocks(starts, ends, block)
        for _ in range(s.length)
    ]


def shown(sequences):
    """What the rows of these sequences see; what the host knows of them is what the device does."""
    assert sequences.causal is False
    assert sequences.starts.tolist() == sequences.starts_on_host.tolist()
    assert sequences.lens.tolist() == sequences.lens_at_most.tolist()
    rows = sequences.starts.diff().tolist()
    assert sequences.longest == max(rows)
    (table,) = sequences.block_tables
    return [
        {(int(table[index][key // PAGE]), key % PAGE) for key in range(length)}
        for index, length in enumerate(sequences.lens.tolist())
        for _ in range(rows[index])
    ]


# ---- what rows see ----


@pytest.mark.parametrize("name", CUT)
def test_rows_on_a_grid_see_what_their_segments_see(name):
    _, _, sequences = sequences_in(CUT[name])
    assert shown(sequences) == expected(CUT[name], GRID)


def test_any_rows_are_cut_as_segments_are():
    random = np.random.default_rng(0)
    cut = 0
    for _ in range(200):
        block = int(random.choice([1, 2, 4, 8, 64]))
        count = int(random.integers(1, 6))
        computed, rows = random.integers(0, 99, count), random.integers(1, 99, count)
        ends = (computed + rows).tolist()
        segments = plan_blocks([0, *rows.cumsum().tolist()], ends, block)
        parts = blocks_of(computed.astype(np.int32), rows.astype(np.int32), block)
        if parts is None:
            assert len(segments) == count
            continue
        cut += 1
        assert parts.text is None
        found = zip(parts.request, parts.rows, parts.behind, strict=True)
        assert [tuple(map(int, one)) for one in found] == [
            (s.request, s.length, ends[s.request] - s.end) for s in segments
        ]
    assert cut > 100


def test_whole_text_is_one_sequence_a_request():
    requests = [PROMPT, (0, 30)]
    _, _, sequences = sequences_in(requests, block=None)
    assert shown(sequences) == expected(requests, None)


# ---- what a step costs, and what a graph reads ----


def test_one_copy_brings_all_that_is_cut(monkeypatch):
    """Each part of it at 16 bytes, or Triton would compile kernels by the number of sequences."""
    sent, copy = [], sequences_module.async_tensor_h2d
    monkeypatch.setattr(
        sequences_module, "async_tensor_h2d", lambda *of, **how: sent.append(of) or copy(*of, **how)
    )
    _, table = batch_of(CUT["all kinds"])
    _, _, found = sequences_in(CUT["all kinds"], table, table)
    assert len(sent) == 1
    assert found.lens.shape[0] % 4, "the next part would be in place by itself"
    assert (found.lens.data_ptr() - found.starts.data_ptr()) % 16 == 0


def test_a_step_within_blocks_keeps_what_a_graph_reads_where_it_is():
    batch, table, sequences = sequences_in(WITHIN_BLOCKS)
    for ours, theirs in (
        (sequences.starts, batch.query_start_loc),
        (sequences.lens, batch.seq_lens),
        (sequences.block_tables[0], table),
    ):
        assert ours.data_ptr() == theirs.data_ptr()
    assert shown(sequences) == expected(WITHIN_BLOCKS, GRID)


@pytest.mark.parametrize("text", [Text.BLOCK, Text.WHOLE])
@pytest.mark.parametrize(
    ("mode", "for_capture", "graph"),
    [
        (CUDAGraphMode.NONE, True, True),  # how vLLM asks for the metadata of a capture
        (CUDAGraphMode.FULL, False, True),
        (CUDAGraphMode.NONE, False, False),
        (CUDAGraphMode.PIECEWISE, False, False),
    ],
)
def test_metadata_has_no_flags_and_no_graph_is_cut(monkeypatch, text, mode, for_capture, graph):
    batch, table = batch_of([OLD_AND_NEW, CANVAS])
    padded = mode == CUDAGraphMode.FULL
    vars(batch).update(
        num_reqs=2, num_reqs_after_padding=2, num_tokens=12, num_tokens_after_padding=12
    )
    attention = object.__new__(step_attention.StepAttention)
    vars(attention).update(
        _family=types.SimpleNamespace(text=text, block=GRID),
        _pool=types.SimpleNamespace(device=torch.device("cuda")),
        _max_model_len=512,
    )
    built = []
    monkeypatch.setattr(step_attention, "build_attn_metadata", lambda **of: built.append(of))
    attention.metadata(
        batch, (table,), None, [], None, spans=[[], []], padded=padded, for_capture=for_capture
    )
    (made,) = built
    assert made["causal"] is False
    assert made["mm_req_doc_ranges"] == {}
    cut = text is Text.BLOCK and not graph
    assert made["num_reqs"] == (3 if cut else 2)
    assert (made["seq_lens"].data_ptr() == batch.seq_lens.data_ptr()) is not cut


def test_uniform_batches_have_graphs_and_whole_text_has_none():
    for text, level in {
        Text.CAUSAL: "UNIFORM_BATCH",
        Text.BLOCK: "UNIFORM_BATCH",
        Text.WHOLE: "NEVER",
    }.items():
        attention = object.__new__(step_attention.StepAttention)
        attention._family = types.SimpleNamespace(text=text)
        support, name = attention.cudagraph_support()
        assert support.name == level
        assert name == "StepAttention"


# ---- which backends ----


def layer(name, version=None):
    return types.SimpleNamespace(
        get_attn_backend=lambda: types.SimpleNamespace(get_name=lambda: name),
        impl=types.SimpleNamespace(vllm_flash_attn_version=version),
    )


@pytest.mark.parametrize(
    ("backend", "version", "taken"),
    [
        ("TRITON_ATTN", None, {Text.BLOCK, Text.WHOLE}),
        ("FLASH_ATTN", 2, {Text.BLOCK, Text.WHOLE}),
        ("FLASH_ATTN", 3, {Text.WHOLE}),
        ("FLASH_ATTN", 4, {Text.BLOCK, Text.WHOLE}),
        ("FLASHINFER", None, set()),
        ("FLEX_ATTENTION", None, set()),
    ],
)
@pytest.mark.parametrize("text", [Text.BLOCK, Text.WHOLE])
def test_backends_that_keep_room_for_few_sequences_are_refused(backend, version, taken, text):
    layers = {"a": layer("TRITON_ATTN"), "b": layer(backend, version)}
    if text in taken:
        require_many_sequences(layers, text)
        return
    with pytest.raises(ConfigError) as error:
        require_many_sequences(layers, text)
    message = str(error.value)
    assert f"attention backend {backend}" in message
    assert message.endswith("start with --attention-backend TRITON_ATTN.")


def test_flash_attention_keeps_a_schedule_in_version_3_alone():
    init = inspect.getsource(flash_attn.FlashAttentionMetadataBuilder.__init__)
    assert "self.aot_schedule = get_flash_attn_version() == 3" in init
    assert "if self.use_full_cuda_graph and self.aot_schedule:" in init
