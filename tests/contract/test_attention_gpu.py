"""The masks of vLLM's GPU kernels, driven by our metadata, against dense attention in fp32.

TRITON_ATTN: the kernel itself, in Triton's interpreter, in one subprocess that runs this very file
(the interpreter is chosen when Triton is imported). FLASH_ATTN: vLLM's own mask function and its
``forward``, with the compiled kernel replaced by a loop over rows and keys.

Blocks that lie before every key a sequence's rows may see are NaN: no kernel should read them.
"""

import functools
import itertools
import json
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from helpers.interpreter import interpreted

TILE = 32  # keys the Triton kernel loads at a time
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Seq:
    """One sequence of a step; its last row is at `end` - 1; `spans` are inclusive image ranges."""

    rows: int
    end: int
    causal: bool = True
    spans: tuple[tuple[int, int], ...] = ()

    def visible(self, window):
        """The definition. [rows, end] bool; window None is a full layer."""
        row = torch.arange(self.end - self.rows, self.end)[:, None]
        key = torch.arange(self.end)[None]
        reach = MAX_MODEL_LEN if window is None else window
        if not self.causal:
            return (key > self.end - self.rows - reach).expand(self.rows, -1)
        seen = (key <= row) & (row - key < reach)
        for first, last in self.spans:
            seen = seen | ((row >= first) & (row <= last) & (key >= first) & (key <= last))
        return seen


@dataclass(frozen=True)
class Case:
    window: int
    canvas: int
    seqs: tuple[Seq, ...]
    heads: tuple[int, int] = (4, 2)
    head_size: int = 32
    block: int = 16
    flags: bool = True  # a causal flag a sequence; otherwise causal=True for the batch


def mixed(canvas, image=28):
    """A prompt with an image, commits, and canvases behind short and long prefixes."""
    return (
        Seq(40, 40, spans=((5, 4 + image),)),
        Seq(canvas, 120),
        Seq(canvas, canvas, causal=False),
        Seq(canvas, canvas + 5, causal=False),
        Seq(20, 110, spans=((2, 9), (92, 107))),
        Seq(canvas, 3 * canvas + 90, causal=False, spans=((2, 9),)),
        Seq(3, 40),
    )


CASES = {
    "window-twice-canvas": Case(32, 16, mixed(16)),
    "window-equals-canvas": Case(16, 16, mixed(16), block=32),
    "canvas-over-several-tiles": Case(96, 80, mixed(80), block=16),
    "three-queries-a-head": Case(40, 24, mixed(24), heads=(6, 2), block=32),
    "one-key-head": Case(48, 16, mixed(16), heads=(4, 1), block=48),
    "head-of-256": Case(24, 16, mixed(16)[:4], heads=(2, 1), head_size=256),
    "image-wider-than-window": Case(20, 16, mixed(16, image=34)),
    "no-images": Case(32, 16, (Seq(16, 100, causal=False), Seq(16, 100), Seq(33, 200))),
    "prompts-only": Case(32, 16, (Seq(40, 40, spans=((5, 32),)), Seq(20, 110)), flags=False),
    "one-row-each": Case(32, 16, (Seq(1, 90), Seq(1, 7)), flags=False),
}


@dataclass
class Batch:
    """Random rows and a paged cache for a case."""

    case: Case
    tile: int  # keys the kernel reads at a time: it may read that much before the first visible one
    query: torch.Tensor = field(init=False)  # [T, heads, D]
    cache: torch.Tensor = field(init=False)  # [blocks, key heads, block, 2 * D]
    table: torch.Tensor = field(init=False)  # [N, blocks a sequence] int32

    def __post_init__(self):
        case, generator = self.case, torch.Generator().manual_seed(7)
        width = max(-(-seq.end // case.block) for seq in case.seqs)
        count = len(case.seqs) * width
        self.query = torch.randn(
            sum(s.rows for s in case.seqs), case.heads[0], case.head_size, generator=generator
        )
        self.cache = torch.randn(
            1 + count, case.heads[1], case.block, 2 * case.head_size, generator=generator
        )
        self.table = (1 + torch.randperm(count, generator=generator).int()).view(-1, width)
        self.expected = torch.cat([self._dense(index) for index in range(len(case.seqs))])
        for seq, blocks in zip(case.seqs, self.table, strict=True):
            first = int(seq.visible(case.window).any(0).int().argmax())
            self.cache[blocks[: first // self.tile * self.tile // case.block]] = torch.nan

    def _dense(self, index):
        seq, (heads, key_heads) = self.case.seqs[index], self.case.heads
        kv = self.cache[self.table[index]].transpose(1, 2).flatten(0, 1)[: seq.end]
        key, value = kv.repeat_interleave(heads // key_heads, 1).split(self.case.head_size, -1)
        start = sum(s.rows for s in self.case.seqs[:index])
        query = self.query[start : start + seq.rows]
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.case.head_size**-0.5
        scores = scores.masked_fill(~seq.visible(self.case.window), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)

    def common(self):
        """The metadata fields that all backends share."""
        seqs = self.case.seqs
        lengths = torch.tensor([0] + [s.rows for s in seqs])
        return {
            "num_actual_tokens": len(self.query),
            "max_query_len": max(s.rows for s in seqs),
            "query_start_loc": lengths.cumsum(0).int(),
            "max_seq_len": max(s.end for s in seqs),
            "seq_lens": torch.tensor([s.end for s in seqs], dtype=torch.int32),
            "block_table": self.table,
            "slot_mapping": torch.empty(0),
            "causal": torch.tensor([s.causal for s in seqs]).int() if self.case.flags else True,
        }

    def images(self):
        return {index: list(seq.spans) for index, seq in enumerate(self.case.seqs)}


def layer(backend, impl, window, cache=None):
    one = torch.ones(1)
    return types.SimpleNamespace(
        get_attn_backend=lambda: types.SimpleNamespace(get_name=lambda: backend),
        impl=impl,
        sliding_window=window,
        kv_cache=torch.empty(0) if cache is None else cache,
        mm_prefix_clamp_sliding_window=False,
        _q_scale=one,
        _k_scale=one,
        _v_scale=one,
    )


def mask_for(layers, canvas_length=16, max_model_len=MAX_MODEL_LEN, max_span=0):
    from vllm_diffusion.engine.attention.gpu import BlockLocalMask

    return BlockLocalMask(
        layers,
        canvas_length=canvas_length,
        max_model_len=max_model_len,
        max_rows=16,
        max_tokens=1024,
        device=torch.device("cpu"),
        max_span=max_span,
    )


# ---- TRITON_ATTN ----


def triton_error(case, mode):
    """Largest error of vLLM's Triton backend; mode "stock", "ranges" (ours, unprepared), "ours"."""
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor

    from vllm_diffusion.engine.attention import kernels as attention_kernels

    batch = Batch(case, tile=TILE if mode == "ours" else MAX_MODEL_LEN)
    heads, size = case.heads[0], case.head_size
    segments = 4
    metadata = triton_attn.TritonAttentionMetadata(
        **batch.common(),
        seq_threshold_3D=64,
        num_par_softmax_segments=segments,
        softmax_segm_output=torch.empty(64, heads, segments, size),
        softmax_segm_max=torch.empty(64, heads, segments),
        softmax_segm_expsum=torch.empty(64, heads, segments),
        mm_prefix_range_tensor=compute_mm_prefix_range_tensor(
            batch.images(), len(case.seqs), torch.device("cpu")
        ),
    )
    impl = triton_attn.TritonAttentionImpl(
        heads, size, size**-0.5, case.heads[1], None, case.window, "auto"
    )
    attention = layer("TRITON_ATTN", impl, case.window, batch.cache)
    step = {"sliding": metadata}
    if mode != "stock":
        unprepared = dict(vars(impl))
        span = max((b - a + 1 for seq in case.seqs for a, b in seq.spans), default=0)
        mask = mask_for({"sliding": attention}, canvas_length=case.canvas, max_span=span)
        mask._form = attention_kernels
        mask.set_canvas_ranges(step)
        if mode == "ranges":
            vars(impl).update(unprepared)
            attention.mm_prefix_clamp_sliding_window = False
    out = torch.empty_like(batch.query)
    impl.forward(attention, batch.query, None, None, batch.cache, step["sliding"], out)
    return float((out - batch.expected).abs().max().nan_to_num(torch.inf))


def run_triton_cases():
    # Without a device vLLM takes Triton for absent, unless Triton has a backend named "cpu".
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    errors = {name: triton_error(case, "ours") for name, case in CASES.items()}
    errors["stock"] = triton_error(CASES["no-images"], "stock")
    errors["ranges"] = triton_error(CASES["no-images"], "ranges")
    print(json.dumps(errors))


@pytest.fixture(scope="module")
def triton_errors():
    pytest.importorskip("vllm")
    return json.loads(interpreted(__file__))


@pytest.mark.vllm
@pytest.mark.parametrize("name", CASES)
def test_triton_kernel_equals_dense_attention(triton_errors, name):
    assert triton_errors[name] <= 1e-5


@pytest.mark.vllm
def test_stock_triton_window_hides_prefix_from_late_canvas_rows(triton_errors):
    """Once this fails vLLM is block-local by itself: delete `attention_gpu`."""
    assert triton_errors["stock"] > 0.1


@pytest.mark.vllm
def test_ranges_alone_lose_values_in_the_triton_kernel(triton_errors):
    """Once this fails its mask over V knows ranges: `_widen` need not touch the window."""
    assert triton_errors["ranges"] > 0.1


# ---- FLASH_ATTN ----


@pytest.fixture
def flash(monkeypatch):
    """vLLM's FLASH_ATTN module with CuTe replaced by plain Python, and a list of kernel calls."""
    module = pytest.importorskip("vllm.v1.attention.backends.flash_attn")
    cutlass = types.SimpleNamespace(min=min, max=max, Int32=int)
    cutlass.cute = types.SimpleNamespace(jit=lambda function: function, TensorSSA=object)
    ssa = types.SimpleNamespace(scalar_to_ssa=lambda x, _: int(x), ssa_to_scalar=lambda x: x)
    stubs = {
        "cutlass": cutlass,
        "cutlass.cute": cutlass.cute,
        "vllm.vllm_flash_attn": types.SimpleNamespace(),
        "vllm.vllm_flash_attn.cute": types.SimpleNamespace(),
        "vllm.vllm_flash_attn.cute.utils": ssa,
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    make_mask = module._make_mm_prefix_mask_mod.__wrapped__
    monkeypatch.setattr(module, "_make_mm_prefix_mask_mod", functools.cache(make_mask))
    calls = []
    monkeypatch.setattr(module, "_FA4_DENSE_ATTENTION_KERNEL", lambda **call: calls.append(call))
    return module, calls


def flash_layer(module, case, cache):
    impl = object.__new__(module.FlashAttentionImpl)
    vars(impl).update(
        attn_type="decoder",
        vllm_flash_attn_version=4,
        fa4_hd256=False,
        head_size=case.head_size,
        num_kv_heads=case.heads[1],
        scale=case.head_size**-0.5,
        sliding_window=(-1, -1) if case.window is None else (case.window - 1, 0),
        kv_cache_dtype="auto",
        supports_quant_query_input=False,
        dcp_world_size=1,
        alibi_slopes=None,
        logits_soft_cap=0,
        sinks=None,
    )
    return layer("FLASH_ATTN", impl, case.window, cache)


def flash_metadata(module, batch):
    from vllm.v1.attention.backends.utils import fill_mm_prefix_query_ranges

    metadata = module.FlashAttentionMetadata(**batch.common())
    images = torch.empty(len(batch.query), 2, dtype=torch.int32)
    start, lens = metadata.query_start_loc, metadata.seq_lens
    if fill_mm_prefix_query_ranges(images.numpy(), batch.images(), start, lens):
        metadata.mm_prefix_query_range_tensor = images
    return metadata


def attend(call):
    """What version 4 computes from a call with a mask function: that mask is all it applies."""
    assert call["causal"] is False
    assert call["window_size"] is None
    assert call["dynamic_causal"] is None
    starts, lens, out = call["cu_seqlens_q"].tolist(), call["seqused_k"].tolist(), []
    for index, length in enumerate(lens):
        query = call["q"][starts[index] : starts[index + 1]]
        assert length <= call["max_seqlen_k"]
        info = types.SimpleNamespace(seqlen_q=len(query), seqlen_k=length)
        keep = torch.empty(len(query), length, dtype=torch.bool)
        for row, key in itertools.product(range(len(query)), range(length)):
            keep[row, key] = call["mask_mod"]([index], [0], row, key, info, call["aux_tensors"])
        blocks = call["block_table"][index]
        group = query.shape[1] // call["k"].shape[2]
        key, value = (
            call[name][blocks].flatten(0, 1)[:length].repeat_interleave(group, 1) for name in "kv"
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * call["softmax_scale"]
        scores = torch.where(keep, scores, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(out)


FLASH_CASES = [
    "window-twice-canvas",
    "window-equals-canvas",
    "three-queries-a-head",
    "image-wider-than-window",
    "no-images",
]


@pytest.mark.vllm
@pytest.mark.parametrize("name", FLASH_CASES)
def test_flash_mask_equals_dense_attention(flash, name):
    module, calls = flash
    case = CASES[name]
    batch = Batch(case, tile=case.block)
    attention = flash_layer(module, case, batch.cache)
    step = {"sliding": flash_metadata(module, batch)}
    mask_for({"sliding": attention}, canvas_length=case.canvas).set_canvas_ranges(step)
    out = torch.empty_like(batch.query)
    attention.impl.forward(attention, batch.query, None, None, batch.cache, step["sliding"], out)
    torch.testing.assert_close(attend(calls[0]), batch.expected, atol=1e-5, rtol=0)


@pytest.mark.vllm
def test_flash_full_layers_keep_their_images(flash):
    """Version 4 drops image ranges from a batch with causal flags, so the flags become ranges."""
    module, calls = flash
    case = Case(None, 16, mixed(16))
    batch = Batch(case, tile=case.block)
    attention = flash_layer(module, case, batch.cache)
    stock = flash_metadata(module, batch)
    step = {"full": stock}
    mask_for({"full": attention}).set_canvas_ranges(step)
    out = torch.empty_like(batch.query)
    for metadata in (step["full"], stock):
        attention.impl.forward(attention, batch.query, None, None, batch.cache, metadata, out)
    torch.testing.assert_close(attend(calls[0]), batch.expected, atol=1e-5, rtol=0)
    assert calls[1]["mask_mod"] is None


if __name__ == "__main__":
    run_triton_cases()
