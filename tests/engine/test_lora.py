"""Adapters: each gives what Transformers gives with its factors added, whoever shares the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import adapter_kernels
from helpers.doubt import decided_run
from helpers.inside import Inside
from helpers.oracle import Oracle
from helpers.parity import ENGINE, SPEC, assert_parity, make_prompt
from helpers.probe import Probe
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from vllm_diffusion.engine.lora.experts import AdaptedExperts
from vllm_diffusion.models.diffusion_gemma.testing.adapters import (
    DECODER,
    ENCODER,
    ONE_STACK,
    changes,
    merge_adapter,
    write_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from vllm import LLM

pytestmark = pytest.mark.vllm

SLOTS = 2
RANK = 8
EXACT = 1e-5

# What each file adapts. Experts are among all modules. A large change of self-conditioning would
# amplify rounding, see ``helpers.parity``.
FILES: dict[str, dict[str, Any]] = {
    "alike": {"seed": 1, "size": 0.15},
    "apart": {"seed": 2, "size": 0.15, "alike": False, "rank": RANK},
    "decoder": {"seed": 3, "size": 0.15, "trees": (DECODER,)},
    "encoder": {"seed": 4, "trees": (ENCODER,), "only": ("self_attn",)},
    "conditioning": {"seed": 5, "only": ("self_conditioning",), "size": 0.05},
    "stack": {"seed": 7, "size": 0.15, "trees": (ONE_STACK,), "only": ("self_attn", "mlp.")},
    "down": {"seed": 6, "only": ("experts.down_proj", "router"), "alike": False},
}
IDS = {name: number for number, name in enumerate(FILES, start=1)}


@pytest.fixture(scope="module")
def files(parity_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / name, parity_checkpoint, **what)
        for name, what in FILES.items()
    }


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(
        parity_checkpoint, **ENGINE, enable_lora=True, max_loras=SLOTS, max_lora_rank=RANK
    )


@pytest.fixture
def adapter(files: dict[str, Path]) -> Callable[[str | None], LoRARequest | None]:
    def request(name: str | None) -> LoRARequest | None:
        return None if name is None else LoRARequest(name, IDS[name], str(files[name]))

    return request


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    adapters: Sequence[LoRARequest | None],
    **options: Any,
) -> list[list[int]]:
    sampling = {"max_tokens": 3 * SPEC.canvas, "ignore_eos": True} | options
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [SamplingParams(seed=seed, **sampling) for seed in seeds],
        lora_request=list(adapters),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def adapted_oracle(checkpoint: Path, adapter: Path) -> Oracle:
    """Transformers with an adapter's factors added, each tree with weights of its own."""
    oracle = Oracle(checkpoint)
    trees = {
        ENCODER: oracle.model.model.encoder.language_model,
        DECODER: oracle.model.model.decoder,
    }
    for tree, root in trees.items():
        own = changes(adapter, tree, SPEC.experts) | changes(adapter, ONE_STACK, SPEC.experts)
        for name, change in own.items():
            path, _, last = name.rpartition(".")
            module = root.get_submodule(path)
            setattr(module, last, nn.Parameter(module.get_parameter(last).detach() + change))
    return oracle


# ---- parity ----


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_gives_what_transformers_gives_with_its_factors_added(
    llm: LLM,
    parity_checkpoint: Path,
    files: dict[str, Path],
    adapter: Callable[..., LoRARequest],
    name: str,
) -> None:
    prompt = make_prompt(70, IDS[name])
    seed, theirs = decided_run(adapted_oracle(parity_checkpoint, files[name]), prompt, IDS[name])
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [seed], [adapter(name)])
    assert_parity(probe.run(seed), theirs)
    assert tokens == theirs.tokens


def test_an_adapter_changes_what_is_written(llm: LLM, adapter: Callable[..., LoRARequest]) -> None:
    prompt = make_prompt(40)
    answers = [generate(llm, [prompt], [1], [adapter(name)])[0] for name in (None, *FILES)]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_logits_are_those_of_the_merged_checkpoint(
    llm: LLM,
    parity_checkpoint: Path,
    files: dict[str, Path],
    adapter: Callable[..., LoRARequest],
    tmp_path: Path,
) -> None:
    merged = Oracle(merge_adapter(parity_checkpoint, files["alike"], tmp_path))
    prompt = make_prompt(49)
    seed, theirs = decided_run(merged, prompt, 1)
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [seed], [adapter("alike")])
    assert tokens == theirs.tokens
    differences = [
        float((mine.logits - step.logits).abs().max() / step.logits.abs().max())
        for ours, canvas in zip(probe.run(seed).canvases, theirs.canvases, strict=True)
        for mine, step in zip(ours, canvas.steps, strict=True)
    ]
    assert max(differences) < EXACT


def test_an_image_passes_through_the_factors_of_text(
    llm: LLM,
    parity_checkpoint: Path,
    files: dict[str, Path],
    adapter: Callable[..., LoRARequest],
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    text, image = "<bos>the quick <|image|> brown fox", Image.fromarray(pixels)
    processor = AutoProcessor.from_pretrained(parity_checkpoint)
    inputs = dict(
        processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    )
    prompt = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask")
    oracle = adapted_oracle(parity_checkpoint, files["encoder"])
    seed, theirs = decided_run(oracle, prompt, 3, canvases=1, inputs=inputs)
    with Probe() as probe:
        llm.generate(
            {"prompt": text, "multi_modal_data": {"image": [image]}},
            SamplingParams(seed=seed, max_tokens=SPEC.canvas, ignore_eos=True),
            lora_request=adapter("encoder"),
            use_tqdm=False,
        )
    assert_parity(probe.run(seed), theirs)


# ---- batches ----


def test_adapters_in_one_batch_give_what_each_gives_alone(
    llm: LLM, adapter: Callable[..., LoRARequest]
) -> None:
    names = ["alike", "apart", None, "alike", None, "apart"]
    prompts = [make_prompt(10 + 23 * number, number) for number in range(len(names))]
    seeds = list(range(len(names)))
    requests = [adapter(name) for name in names]
    together = generate(llm, prompts, seeds, requests)
    alone = [
        generate(llm, [prompt], [seed], [request])[0]
        for prompt, seed, request in zip(prompts, seeds, requests, strict=True)
    ]
    assert together == alone


def test_more_adapters_than_slots_wait_for_each_other(
    llm: LLM, adapter: Callable[..., LoRARequest]
) -> None:
    prompts = [make_prompt(20, number) for number in range(len(FILES))]
    requests = [adapter(name) for name in FILES]
    together = generate(llm, prompts, range(len(FILES)), requests)
    alone = [
        generate(llm, [prompt], [seed], [request])[0]
        for seed, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
    ]
    assert together == alone


def test_fused_and_separate_commits_are_the_same(
    llm: LLM, adapter: Callable[..., LoRARequest]
) -> None:
    prompts = [make_prompt(30, number) for number in range(3)]
    requests = [adapter(name) for name in ("apart", None, "decoder")]
    fused, separate = (
        generate(llm, prompts, [1, 2, 3], requests, extra_args={"diffusion_fused_commit": form})
        for form in (True, False)
    )
    assert fused == separate


def test_the_kernels_of_gpus_would_be_given_the_same_rows(
    llm: LLM, adapter: Callable[..., LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows as they stand on a GPU, behind vLLM's wrapper for GPUs, in place of ours for CPUs.

    Its two kernels are plain products here; ``test_lora_kernels`` holds them against the truth.
    """
    names = ["alike", None, "apart", "alike", "conditioning"]
    batch = (
        [make_prompt(10 + 23 * number, number) for number in range(len(names))],
        list(range(len(names))),
        [adapter(name) for name in names],
    )
    ours = generate(llm, *batch)
    inside = Inside(llm).runner
    adapters, tokens = inside.lora_manager, inside.scheduler_config.max_num_batched_tokens
    adapter_kernels.install(monkeypatch)
    stock = adapters._rows, adapters._conditioning_rows
    rows = [adapter_kernels.make_rows(inside.lora_config, tokens) for _ in stock]
    try:
        adapters.take_rows(*rows)
        assert generate(llm, *batch) == ours
        assert generate(llm, *(part[1:2] for part in batch)) == ours[1:2]
    finally:
        adapters.take_rows(*stock)


def test_a_prefix_is_not_shared_between_adapters(
    llm: LLM, adapter: Callable[..., LoRARequest]
) -> None:
    prompt = make_prompt(150)
    expected = {}
    for name in ("alike", None, "apart"):
        assert llm.reset_prefix_cache()
        expected[name] = generate(llm, [prompt], [5], [adapter(name)])
    for name in ("alike", "apart", None, "alike"):
        assert generate(llm, [prompt], [5], [adapter(name)]) == expected[name]
    sampling = SamplingParams(max_tokens=1, seed=5)
    cached = {
        name: llm.generate(
            {"prompt_token_ids": prompt}, sampling, lora_request=adapter(name), use_tqdm=False
        )[0].num_cached_tokens
        for name in ("alike", "decoder")
    }
    assert cached == {"alike": 128, "decoder": 0}


# ---- bad adapters ----


@pytest.fixture
def refused(llm: LLM) -> Iterator[Callable[[Path], str]]:
    """What is said of an adapter; the engine serves afterwards as before."""

    def refuse(path: Path) -> str:
        with pytest.raises(VLLMValidationError) as caught:
            generate(llm, [make_prompt(8)], [1], [LoRARequest("bad", 99, str(path))])
        return str(caught.value)

    before = generate(llm, [make_prompt(8)], [1], [None])
    yield refuse
    assert generate(llm, [make_prompt(8)], [1], [None]) == before
    Inside(llm).assert_idle()


def test_a_rank_above_the_served_one_is_refused(
    refused: Callable[[Path], str], parity_checkpoint: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path, parity_checkpoint, rank=RANK + 1)
    assert f"its rank {RANK + 1} is above {RANK}, see --max-lora-rank" in refused(tmp_path)


def test_an_adapter_for_another_model_is_refused(
    refused: Callable[[Path], str], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    wider = make_checkpoint(hidden=96)
    message = refused(write_adapter(tmp_path, wider))
    assert "factors of another shape: " in message
    assert " more" in message


def test_every_problem_is_in_one_message(
    refused: Callable[[Path], str], parity_checkpoint: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path, parity_checkpoint, options={"use_dora": True, "bias": "all"})
    file = tmp_path / "adapter_model.safetensors"
    factors = load_file(file)
    factors["base_model.model.model.blocks.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)
    factors["base_model.model.model.blocks.0.self_attn.q_proj.lora_B.weight"] = torch.ones(64, 4)
    save_file(factors, file)
    message = refused(tmp_path)
    for part in (
        "use_dora is not served",
        "bias is not served",
        "modules the model does not have",
        "model.blocks.0.self_attn.q_proj",
    ):
        assert part in message


def test_an_adapter_that_was_mended_is_served(
    llm: LLM,
    refused: Callable[[Path], str],
    parity_checkpoint: Path,
    adapter: Callable[..., LoRARequest],
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path, parity_checkpoint, **FILES["alike"], options={"use_dora": True})
    assert "use_dora" in refused(tmp_path)
    write_adapter(tmp_path, parity_checkpoint, **FILES["alike"])
    mended = LoRARequest("bad", 99, str(tmp_path))
    prompt = make_prompt(20)
    assert generate(llm, [prompt], [1], [mended]) == generate(
        llm, [prompt], [1], [adapter("alike")]
    )


# ---- other engines; last, since one lives at a time ----


def test_without_experts_among_the_targets_vllms_kernel_stays(
    engine: Callable[..., LLM],
    parity_checkpoint: Path,
    files: dict[str, Path],
    adapter: Callable[..., LoRARequest],
) -> None:
    targets = ["qkv_proj", "o_proj"]
    llm = engine(parity_checkpoint, **ENGINE, enable_lora=True, lora_target_modules=targets)
    for layer in Inside(llm).runner.model.model.layers:
        kernel = layer.experts.routed_experts.quant_method.moe_kernel.fused_experts
        assert isinstance(kernel, CPUUnquantizedExperts)
        assert not isinstance(kernel, AdaptedExperts)
    prompt = make_prompt(70)
    oracle = adapted_oracle(parity_checkpoint, files["encoder"])
    seed, theirs = decided_run(oracle, prompt, 1)
    assert generate(llm, [prompt], [seed], [adapter("encoder")]) == [theirs.tokens]
    with pytest.raises(VLLMValidationError, match="served without adapters"):
        generate(llm, [prompt], [seed], [adapter("alike")])
