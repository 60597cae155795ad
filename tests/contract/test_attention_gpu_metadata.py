"""What `BlockLocalMask` does to layers and metadata, and the facts of vLLM it stands on."""

import copy
import dataclasses
import inspect
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from vllm.v1.attention.backends import flash_attn, triton_attn

from vllm_diffusion.engine.attention.gpu import (
    BlockLocalMask,
    needs_block_local,
    require_block_local,
    supports_block_local,
)
from vllm_diffusion.errors import ConfigError

pytestmark = pytest.mark.vllm

WINDOW, CANVAS, BLOCK = 32, 16, 16


def layer(backend="TRITON_ATTN", window=WINDOW, *, version=4, hd256=False):
    impl = types.SimpleNamespace(vllm_flash_attn_version=version, fa4_hd256=hd256)
    return types.SimpleNamespace(
        get_attn_backend=lambda: types.SimpleNamespace(get_name=lambda: backend),
        impl=impl,
        sliding_window=window,
        kv_cache=torch.empty(4, 2, BLOCK, 64),
        mm_prefix_clamp_sliding_window=False,
    )


def mask_of(layers, canvas_length=CANVAS, max_model_len=512, max_span=0):
    return BlockLocalMask(
        layers,
        canvas_length=canvas_length,
        max_model_len=max_model_len,
        max_rows=8,
        max_tokens=128,
        device=torch.device("cpu"),
        max_span=max_span,
    )


def metadata(rows, ends, causal, images=None):
    lengths = torch.tensor([0, *rows])
    padded = sum(rows) + 5  # as in a captured graph: more tokens than the sequences have
    return types.SimpleNamespace(
        num_actual_tokens=padded,
        max_query_len=max(rows),
        max_seq_len=512,
        query_start_loc=lengths.cumsum(0).int(),
        seq_lens=torch.tensor(ends, dtype=torch.int32),
        causal=causal if isinstance(causal, bool) else torch.tensor(causal, dtype=torch.int32),
        block_table=torch.arange(len(rows) * 32, dtype=torch.int32).view(len(rows), 32),
        mm_prefix_range_tensor=images,
        mm_prefix_query_range_tensor=images,
    )


def one_step(ends=(100, 20, 0), images=None):
    """A canvas behind a long prefix, a causal row each, and a padding sequence."""
    return metadata([CANVAS, 4, 0], list(ends), [0, 1, 0], images)


# ---- what needs what ----


@pytest.mark.parametrize(
    ("backend", "version", "supported"),
    [
        ("TRITON_ATTN", None, True),
        ("CPU_ATTN", None, True),
        ("FLASH_ATTN", 4, True),
        ("FLASH_ATTN", 3, False),
        ("FLASH_ATTN", 2, False),
        ("FLASH_ATTN", None, False),
        ("FLASHINFER", None, False),
        ("FLEX_ATTENTION", None, False),
        ("TRITON_FLASH_ATTN", 4, False),
    ],
)
def test_supported_backends(backend, version, supported):
    assert supports_block_local(backend, version) is supported


def test_a_window_as_wide_as_the_model_needs_nothing():
    assert needs_block_local(1025, 1024)
    assert not needs_block_local(1024, 1024)
    assert not needs_block_local(10**6, None)
    require_block_local("FLASHINFER", fa_version=None, window=1024, max_model_len=1024)
    attention = layer("FLASHINFER")
    mask_of({"a": attention}, max_model_len=WINDOW)
    assert vars(attention.impl) == {"vllm_flash_attn_version": 4, "fa4_hd256": False}


def test_the_refusal_says_got_accepted_and_the_way_out():
    with pytest.raises(ConfigError) as error:
        mask_of({"full": layer("FLASH_ATTN", None, version=3), "a": layer("FLASH_ATTN", version=3)})
    message = str(error.value)
    for part in ("FLASH_ATTN (FlashAttention 3)", "31 positions", "512", "window of 32"):
        assert part in message
    for way in ("TRITON_ATTN, FLASH_ATTN with FlashAttention 4", "CPU_ATTN", "--max-model-len 32"):
        assert way in message


def test_blackwells_kernel_for_heads_of_256_is_refused():
    with pytest.raises(ConfigError, match="takes no ranges"):
        mask_of({"a": layer("FLASH_ATTN", hd256=True)})


def test_a_canvas_longer_than_the_window_is_refused_by_triton_alone():
    with pytest.raises(ConfigError, match=r"canvas of 33 tokens .* up to 32"):
        mask_of({"a": layer()}, canvas_length=33)
    mask_of({"a": layer("FLASH_ATTN")}, canvas_length=33)


# ---- layers ----


@pytest.mark.parametrize(("span", "reach"), [(0, 47), (16, 47), (28, 59), (500, 63)])
def test_triton_layers_state_their_window_as_lookback(span, reach):
    attention, full = layer(), layer(window=None)
    mask_of({"a": attention, "full": full}, max_span=span)
    assert attention.impl.sliding_window == (reach - 1, 0)
    assert attention.impl.chunk_lookback == WINDOW - 1
    assert reach // (attention.impl.chunk_lookback + 1) == 1, "chunks must hold one key"
    assert attention.mm_prefix_clamp_sliding_window
    assert not hasattr(full.impl, "chunk_lookback")


# ---- metadata ----


def test_triton_ranges():
    step = {"a": one_step()}
    mask_of({"a": layer()}).set_canvas_ranges(step)
    assert step["a"].mm_prefix_range_tensor.tolist() == [[[53, 99]], [[0, 0]], [[0, -1]]]


def test_triton_keeps_images_and_compiles_for_few_counts():
    images = torch.tensor([[[5, 9], [11, 15]], [[2, 8], [0, 0]], [[0, 0], [0, 0]]])
    step = {"a": one_step(images=images.int())}
    mask_of({"a": layer()}).set_canvas_ranges(step)
    ranges = step["a"].mm_prefix_range_tensor
    assert ranges.shape == (3, 4, 2)
    assert ranges.is_contiguous()
    assert ranges[0].tolist() == [[53, 99], [5, 9], [11, 15], [0, 0]]
    assert ranges[1].tolist() == [[0, 0], [2, 8], [0, 0], [0, 0]]


def test_flash_ranges_lengths_and_table_are_cut_together():
    step = {"a": one_step(ends=(100, 60, 0))}
    stock = step["a"]
    mask_of({"a": layer("FLASH_ATTN")}).set_canvas_ranges(step)
    cut = step["a"]
    # The canvas sees from 53 on, in the block that starts at 48; the causal rows 56..59 from 25 on.
    assert cut.seq_lens.tolist() == [100 - 48, 60 - 16, 0]
    assert cut.block_table[:2, 0].tolist() == [3, 32 + 1]
    assert cut.block_table.shape[1] * BLOCK >= WINDOW - 1 + CANVAS + BLOCK - 1
    assert cut.max_seq_len == cut.block_table.shape[1] * BLOCK
    expected = [[5, 51]] * CANVAS + [[-1, -1]] * (4 + 5)
    assert cut.mm_prefix_query_range_tensor.tolist() == expected
    assert cut.causal is True
    assert stock.seq_lens.tolist() == [100, 60, 0]
    assert isinstance(stock.causal, torch.Tensor)


def test_flash_full_layer_without_images_keeps_its_flags():
    step = {"full": one_step()}
    stock = step["full"]
    mask_of({"full": layer("FLASH_ATTN", None)}).set_canvas_ranges(step)
    assert step["full"] is stock


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_a_batch_of_prompts_is_left_alone(backend):
    stock = metadata([20, 30], [20, 90], causal=True)
    step = {"a": stock}
    mask_of({"a": layer(backend)}).set_canvas_ranges(step)
    assert step["a"] is stock


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_only_sliding_layers_get_ranges_where_a_group_mixes_windows(backend):
    shared = one_step()
    step = dict.fromkeys(("full", "a", "b", "unknown"), shared)
    layers = {"full": layer(backend, None), "a": layer(backend), "b": layer(backend)}
    mask_of(layers).set_canvas_ranges(step)
    assert step["full"] is shared
    assert step["unknown"] is shared
    assert step["a"] is step["b"] is not shared
    assert shared.mm_prefix_range_tensor is None


def addresses(made):
    tensors = (made.mm_prefix_range_tensor, made.mm_prefix_query_range_tensor, made.seq_lens)
    return [t.data_ptr() for t in (*tensors, made.block_table) if t is not None]


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_what_a_graph_reads_stays_at_its_address_and_changes(backend):
    mask = mask_of({"a": layer(backend), "b": layer(backend)})
    inputs = one_step()
    first = {"a": inputs, "b": copy.copy(inputs)}  # two KV cache groups
    second = dict(first)
    mask.set_canvas_ranges(first)
    captured = addresses(first["a"]), addresses(first["b"])
    inputs.seq_lens[0] = 200
    mask.set_canvas_ranges(second)
    assert (addresses(second["a"]), addresses(second["b"])) == captured
    if backend == "FLASH_ATTN":
        assert first["a"].seq_lens[0] == 200 - 144
        assert first["a"].block_table[0, 0] == 144 // BLOCK
    else:
        assert first["a"].mm_prefix_range_tensor[0, 0].tolist() == [153, 199]


def test_a_captured_triton_graph_sees_canvases_beside_old_images():
    mask = mask_of({"a": layer()})
    captured = {"a": one_step()}
    mask.set_canvas_ranges(captured)
    images = torch.tensor([[[5, 9]], [[0, 0]], [[0, 0]]], dtype=torch.int32)
    mask.set_canvas_ranges({"a": one_step(ends=(300, 20, 0), images=images)})
    assert captured["a"].mm_prefix_range_tensor[0, 0].tolist() == [253, 299]


class NoHostSync(TorchDispatchMode):
    """Fails on the operators through which a value, or a shape made of values, reaches the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize("with_images", [False, True])
def test_the_device_is_never_waited_for(backend, with_images):
    images = None
    if with_images:
        images = torch.full((3, 2, 2) if backend == "TRITON_ATTN" else (20, 2), -1)
    mask = mask_of({"a": layer(backend)})
    step = {"a": one_step(images=None if images is None else images.int())}
    with NoHostSync():
        mask.set_canvas_ranges(step)


# ---- facts of vLLM ----


def test_metadata_fields():
    triton = {f.name for f in dataclasses.fields(triton_attn.TritonAttentionMetadata)}
    flash = {f.name for f in dataclasses.fields(flash_attn.FlashAttentionMetadata)}
    shared = {"query_start_loc", "seq_lens", "block_table", "causal", "max_seq_len"}
    assert shared | {"mm_prefix_range_tensor"} <= triton
    assert shared | {"mm_prefix_query_range_tensor", "num_actual_tokens", "max_query_len"} <= flash


def test_triton_reads_window_and_lookback_from_the_layer_at_every_forward():
    init = inspect.signature(triton_attn.TritonAttentionImpl.__init__).parameters
    assert init["chunk_lookback"].default == -1
    forward = inspect.getsource(triton_attn.TritonAttentionImpl.forward)
    assert "window_size=self.sliding_window" in forward
    assert "chunk_lookback=self.chunk_lookback" in forward
    assert "mm_prefix_clamp_sliding_window" in forward


def test_flash_takes_ranges_in_version_4_from_a_causal_batch_alone():
    forward = inspect.getsource(flash_attn.FlashAttentionImpl.forward)
    for condition in ("not is_dynamic_causal", "causal is True", "vllm_flash_attn_version == 4"):
        assert condition in forward
    assert "[mm_prefix_query_ranges, attn_metadata.query_start_loc]" in forward
