"""Quantised checkpoints on a CPU: as good as the weights they stand for, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.dequantised import matrix, write_dequantised
from helpers.doubt import decided_run
from helpers.inside import Inside
from helpers.oracle import Oracle
from helpers.parity import (
    ENGINE,
    SPEC,
    WHOLE_CANVASES,
    assert_parity,
    conditioned_checkpoint,
    generate,
    make_prompt,
)
from helpers.probe import Probe
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

from vllm_diffusion.engine.packed_layers.layers import HostExperts, HostLinear, describe
from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.models.diffusion_gemma.testing import quantisable as maker
from vllm_diffusion.models.diffusion_gemma.testing.adapters import merge_adapter, write_adapter
from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import dequantise
from vllm_diffusion.testing.quantise import WEIGHTS, quantise_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.engines import EnginePool
    from helpers.oracle import OracleRun
    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# The released forms, and one that quantises what their ignore lists hold back.
FORMS = ("nvfp4", "fp8-dynamic", "nvfp4-more")

# The third form's engine serves adapters, too.
LORA = {"nvfp4-more": {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}}
ADAPTED = ("self_attn", "mlp", "router", "self_conditioning")  # experts cannot be

FULL = 2  # the full-attention layer, whose keys are its values
EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")

MORE = {
    "self_conditioning.gate_up_proj",
    "self_conditioning.down_proj",
    "embed_vision.embedding_projection",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conditioned_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=FORMS)
def quantised(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: Any) -> Path:
    """A quantised checkpoint; beside it `reference`, the weights it stands for."""
    folder = tmp_path_factory.mktemp("quantised") / request.param
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "nvfp4-more":
            patch.setattr(maker, "split", split_more)
        quantise_checkpoint(plain, folder, request.param.removesuffix("-more"))
    if request.param == "nvfp4":
        set_scales_apart(folder / WEIGHTS)
    write_dequantised(folder, plain, folder / "reference")
    return folder


def split_more(weights: dict[str, torch.Tensor], split: Any = maker.split) -> Any:
    """What the maker quantises, self-conditioning and the vision connector."""
    matrices, rest = split(weights)
    for name in [name for name in rest if name.endswith("_proj.weight") or "_projection" in name]:
        if "self_conditioning" in name or "embed_vision" in name:
            matrices[name.removesuffix(".weight")] = rest.pop(name)
    return matrices, rest


def set_scales_apart(file: Path) -> None:
    """Give parts of fused matrices other whole scales, and groups such that little changes."""
    weights = load_file(file)
    for module in ("self_attn.k_proj", "mlp.up_proj", "experts.1.up_proj"):
        name = f"model.decoder.layers.1.{module}.weight"
        halved = weights[f"{name}_scale"].float() / 2
        weights[f"{name}_scale"] = halved.to(torch.float8_e4m3fn)
        weights[f"{name}_global_scale"] /= 2
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def llm(quantised: Path, engine: Callable[..., LLM]) -> LLM:
    return engine(quantised, **ENGINE, **LORA.get(quantised.name, {}))


def test_every_number_is_that_of_the_dequantised_weights(quantised: Path, llm: LLM) -> None:
    check_layers(llm, quantised)
    oracle = Oracle(quantised / "reference")
    exact = Oracle(quantised / "reference", dtype=torch.float64)
    for length in (1, 49):
        prompt = make_prompt(length)
        seed, theirs = decided_run(oracle, prompt, length)
        with Probe() as probe:
            (tokens,) = generate(llm, [prompt], [seed])
        ours = probe.run(seed)
        assert_parity(ours, theirs)
        assert tokens == theirs.tokens
        # No further from the truth than Transformers is with plain weights of the same precision.
        truth = first_logits(exact.generate(prompt, seed=seed, canvases=1)).double()
        mine = (ours.canvases[0][0].logits.double() - truth).square().mean().sqrt()
        rounding = (first_logits(theirs).double() - truth).square().mean().sqrt()
        assert mine <= 2 * rounding


@pytest.mark.parametrize("quantised", LORA, indirect=True, scope="module")
def test_adapters_of_a_quantised_checkpoint(
    quantised: Path, llm: LLM, plain: Path, tmp_path: Path
) -> None:
    adapters = [
        LoRARequest(name, number, str(write_adapter(tmp_path / name, plain, **what)))
        for number, (name, what) in enumerate(
            {
                "alike": {"seed": 1, "size": 0.1, "only": ADAPTED[:3]},
                "apart": {"seed": 2, "size": 0.1, "only": ADAPTED, "alike": False},
            }.items(),
            start=1,
        )
    ]
    merged = merge_adapter(quantised / "reference", tmp_path / "alike", tmp_path / "merged")
    prompt = make_prompt(49)
    seed, theirs = decided_run(Oracle(merged), prompt, 1)
    prompts = [prompt, make_prompt(20, 1), make_prompt(33, 2)]
    seeds, requests = [seed, 1, 2], [adapters[0], adapters[1], None]
    alone = [
        answer(llm, [prompt], [seed], [adapter])[0]
        for prompt, seed, adapter in zip(prompts, seeds, requests, strict=True)
    ]
    assert alone[0] == theirs.tokens
    assert answer(llm, prompts, seeds, requests) == alone
    assert alone[1] != generate(llm, prompts[1:2], seeds[1:2])[0]


def answer(
    llm: LLM,
    prompts: list[list[int]],
    seeds: list[int],
    adapters: list[LoRARequest | None],
) -> list[list[int]]:
    """As `generate`, every prompt with an adapter of its own."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(seed=seed, **WHOLE_CANVASES) for seed in seeds],
        lora_request=adapters,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_logits(run: OracleRun) -> torch.Tensor:
    return run.canvases[0].steps[0].logits


def check_layers(llm: LLM, folder: Path) -> None:
    """What is quantised in the released files, and nothing else, is quantised here."""
    model = Inside(llm).runner.model
    quantised, plain = set(), set()
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")  # of an adapted layer
        if isinstance(module, LinearBase | RoutedExperts):
            packed = isinstance(module.quant_method, HostLinear | HostExperts)
            (quantised if packed else plain).add(".".join(name.split(".")[3:]) or name)
            if packed and native.library() is not None:
                assert module.quant_method.packed
                assert not list(module.named_parameters(recurse=False))
    assert quantised == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "experts.routed_experts",
    } | (MORE if "more" in folder.name else set())
    assert "router.proj" in plain
    if native.library() is not None:
        stored = load_file(folder / WEIGHTS)
        sizes = {name: one.numel() for name, one in stored.items() if one.itemsize == 1}
        codes = {name: size for name, size in sizes.items() if not name.endswith("scale")}
        # The full layer, the last one, multiplies with its keys twice: they are its values too.
        full = [size for name, size in codes.items() if "layers.2.self_attn.k_proj." in name]
        each = 2 if any("packed" in name for name in codes) else 1
        plain_mb = 4 * each * (sum(codes.values()) + sum(full)) / 1e6
        assert f", {plain_mb:.1f} MB as torch.float32" in str(describe(model, torch.float32))


def test_without_the_compiled_part_weights_are_dequantised(
    plain: Path, tmp_path: Path, engine_pool: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantise_checkpoint(plain, tmp_path, "nvfp4")
    write_dequantised(folder, plain, tmp_path / "reference")
    monkeypatch.setattr(native, "library", lambda: None)
    prompt, seed = make_prompt(49), 7
    llm = engine_pool.get(folder, **ENGINE)
    assert "dequantised" in str(describe(Inside(llm).runner.model, torch.float32))
    ours = generate(llm, [prompt], [seed])
    assert ours == generate(engine_pool.get(tmp_path / "reference", **ENGINE), [prompt], [seed])


@pytest.mark.skipif(native.library() is None, reason="looks into packed matrices")
def test_the_file_of_model_optimizer(plain: Path, tmp_path: Path, engine_pool: EnginePool) -> None:
    """Its engine multiplies with the numbers of the file that compressed-tensors wrote."""
    folder = quantise_checkpoint(plain, tmp_path / "optimizer", "modelopt-nvfp4")
    peer = load_file(quantise_checkpoint(plain, tmp_path / "peer", "nvfp4") / WEIGHTS)
    # vLLM lets no model in float32 have this form.
    llm = engine_pool.get(folder, **ENGINE, dtype="bfloat16")
    model = Inside(llm).runner.model
    # Left alone, and tied: a CPU's linear layer would have packed it.
    table = load_file(folder / WEIGHTS)["model.decoder.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight[: len(table)], table.bfloat16())
    for number, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.experts.routed_experts
        values = "v_proj" if number != FULL else "k_proj"
        for where, module, names in (
            ("self_attn.", attention.qkv_proj, ("q_proj", "k_proj", values)),
            ("self_attn.", attention.o_proj, ("o_proj",)),
            ("mlp.", layer.mlp.gate_up_proj, ("gate_proj", "up_proj")),
            ("mlp.", layer.mlp.down_proj, ("down_proj",)),
            *((f"experts.{one}.", (experts, one), EXPERT_MATRICES) for one in range(SPEC.experts)),
        ):
            expected = [matrix(peer, f"model.decoder.layers.{number}.{where}{n}") for n in names]
            packed = (
                [stack[module[1]] for stack in experts.quant_method.packed]
                if isinstance(module, tuple)
                else module.quant_method.packed
            )
            found = torch.cat([dequantise(one, torch.float64).flatten() for one in packed])
            truth = torch.cat([one.flatten() for one in expected])
            torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    assert len(set(generate(llm, [make_prompt(9)], [1])[0])) > SPEC.canvas / 2


# ---- files that cannot be served; tests/contract/test_quantised_files.py has more of them ----


@pytest.mark.parametrize("what", ["lacks", "no numbers"])
def test_a_broken_file(what: str, plain: Path, tmp_path: Path, engine_pool: EnginePool) -> None:
    folder = quantise_checkpoint(plain, tmp_path, "nvfp4")
    weights = load_file(folder / WEIGHTS)
    scale = "model.decoder.layers.1.experts.2.up_proj.weight_scale"
    if what == "lacks":
        del weights[scale]
    else:
        weights[scale].view(torch.uint8)[0, 0] = 0x7F
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=what):
        engine_pool.get(folder, **ENGINE)


@pytest.mark.parametrize("part", ["router.proj", "lm_head"])
def test_a_quantised_router_or_head_is_one_error(
    part: str, plain: Path, tmp_path: Path, engine_pool: EnginePool
) -> None:
    """As a recipe for all linear modules writes it that has no ignore list."""
    folder = quantise_checkpoint(plain, tmp_path, "fp8-dynamic")
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"].clone()
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(f"{part}.weight")]
    for module in modules:
        peaks = weights[f"{module}.weight"].float().abs().amax(1, keepdim=True)
        scaled = weights[f"{module}.weight"].float() / (peaks / 448)
        weights[f"{module}.weight"] = scaled.to(torch.float8_e4m3fn)
        weights[f"{module}.weight_scale"] = (peaks / 448).to(torch.bfloat16)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised where it cannot be served so") as caught:
        engine_pool.get(folder, **ENGINE)
    assert all(module in str(caught.value) for module in modules)


def test_an_unknown_scheme(plain: Path, tmp_path: Path, engine_pool: EnginePool) -> None:
    folder = quantise_checkpoint(plain, tmp_path, "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a CPU cannot run") as caught:
        engine_pool.get(folder, **ENGINE)
    assert "4 bit float weights by tensor_group of 32" in str(caught.value)
    assert "NVFP4 in groups of 16" in str(caught.value)
