"""Which forwards are captured as CUDA graphs, as vLLM makes of what we ask for."""

import types

import pytest

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_diffusion.engine import graphs
from vllm_diffusion.engine.graphs import capture_sizes, choose_capture_sizes, counted
from vllm_diffusion.family import Text

pytestmark = pytest.mark.vllm

CANVAS = 256


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(graphs.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(graphs.carriers, "served", lambda config: config)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(graphs.logger, "info", lambda text, *of: lines.append(text % of))
    return lines


def config(seqs=16, rows=8192, *, canvas=CANVAS, text=Text.CAUSAL, **asked):
    """As much of a config as vLLM's choice of sizes reads, ours and then vLLM's made."""
    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    family = types.SimpleNamespace(text=text)
    eager = asked.pop("enforce_eager", False)
    for name, value in asked.items():
        setattr(compilation, name, value)
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            enforce_eager=eager, hf_config=types.SimpleNamespace(family=family)
        ),
        compilation_config=compilation,
        scheduler_config=types.SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=rows),
        diffusion_config=types.SimpleNamespace(canvas_length=canvas),
        speculative_config=None,
        uniform_decode_query_len=canvas,
        performance_mode="balanced",
        cache_config=types.SimpleNamespace(use_kda_recoverssm=False),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
    )
    choose_capture_sizes(config)
    VllmConfig._set_cudagraph_sizes(config)
    return config


def replayed(config, monkeypatch, canvas=CANVAS):
    """For 1, 2, ... canvases the number whose FULL graph vLLM replays; None where there is none."""
    group = types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    monkeypatch.setattr(
        type(cudagraph_utils.current_platform),
        "get_global_graph_pool",
        lambda _: None,
        raising=False,
    )
    manager = CudaGraphManager(
        config, None, CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=canvas
    )
    graphs = []
    for canvases in range(1, config.scheduler_config.max_num_seqs + 1):
        rows = canvases * canvas
        key = next((k for k in ((rows, 0), rows) if k in manager._candidates), None)
        of = [] if key is None else manager._candidates[key]
        full = [d for d in of if d.cg_mode == CUDAGraphMode.FULL and d.num_tokens >= rows]
        graphs.append(min((d.num_reqs for d in full), default=None))
    return graphs


@pytest.mark.parametrize("seqs", [1, 2, 3, 16, 32])
def test_every_number_of_canvases_replays_a_graph_of_its_own(monkeypatch, seqs):
    assert replayed(config(seqs), monkeypatch) == list(range(1, seqs + 1))


def test_many_canvases_replay_a_graph_little_larger(monkeypatch):
    graphs = replayed(config(200, rows=200 * CANVAS), monkeypatch)
    assert None not in graphs
    wasted = [(graph - count) / graph for count, graph in enumerate(graphs, 1)]
    assert max(wasted) <= 1 / 32
    assert not any(wasted[:32])
    assert len(set(graphs)) <= 100


def test_without_us_three_canvases_have_no_graph(monkeypatch):
    """Once this fails vLLM covers canvases by itself: delete `engine.graphs`."""
    monkeypatch.setattr(graphs.current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(
        type(graphs.current_platform), "is_device_capability_family", lambda *_: False
    )
    assert replayed(config(16), monkeypatch)[2:] == [None] * 14


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"cudagraph_capture_sizes": [8, 256, 768]}, [8, 256, 768]),
        ({"max_cudagraph_capture_size": 256}, [1, 2, 4, *range(8, 257, 8)]),
    ],
)
def test_what_the_user_asks_for_is_kept(said, asked, kept):
    assert config(**asked).compilation_config.cudagraph_capture_sizes == kept
    (line,) = said
    canvases = kept[-1] // CANVAS
    assert f"up to {kept[-1]} rows: steps of more than {canvases} canvases have none" in line


@pytest.mark.parametrize("asked", [{"enforce_eager": True}, {"cudagraph_mode": CUDAGraphMode.NONE}])
def test_where_nothing_is_captured_nothing_is_asked_for_or_said(said, asked):
    assert config(**asked).compilation_config.cudagraph_capture_sizes == []
    assert not said


def test_sizes_hold_steps_of_prompts_and_fit_the_budget(said):
    sizes = config(4, rows=1200).compilation_config.cudagraph_capture_sizes
    assert sizes == [*range(32, 257, 32), 320, 384, 448, 512, 768, 1024]
    assert config(1).compilation_config.max_cudagraph_capture_size == 2 * CANVAS
    assert "up to 1024: 4 are whole canvases" in said[0]
    assert "vLLM logs their memory" in said[0]


def test_any_canvas_has_sizes():
    assert capture_sizes(canvas=1, seqs=1, rows=64) == [1, 2]
    assert capture_sizes(canvas=24, seqs=2, rows=48) == list(range(8, 49, 8))
    assert capture_sizes(canvas=4, seqs=16, rows=8192) == [4, *range(8, 65, 8), 68]
    assert [len(counted(seqs)) for seqs in (1, 64, 1024)] == [1, 49, 135]


@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("seqs", [1, 16, 256, 1024])
def test_blocks_of_a_grid_have_few_graphs_and_little_padding(monkeypatch, block, seqs):
    asked = config(seqs, canvas=block, text=Text.BLOCK)
    assert len(asked.compilation_config.cudagraph_capture_sizes) <= 70
    largest = asked.compilation_config.max_cudagraph_capture_size
    assert largest <= 1024
    found = replayed(asked, monkeypatch, canvas=block)
    for count, graph in enumerate(found, 1):
        if count * block <= largest // block * block:
            assert (graph - count) * block < max(8, block) + count * block / 32, count
        else:
            assert graph is None
    assert found[0] == 1


@pytest.mark.parametrize("mode", [None, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_whole_text_keeps_the_sizes_of_vllm_and_has_no_full_graph(said, mode):
    found = config(text=Text.WHOLE, canvas=4096, cudagraph_mode=mode).compilation_config
    assert found.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert found.cudagraph_capture_sizes[:5] == [1, 2, 4, 8, 16]
    assert not said


def test_whole_text_keeps_the_mode_that_the_user_asks_for():
    asked = {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY}
    found = config(text=Text.WHOLE, **asked).compilation_config
    assert found.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
