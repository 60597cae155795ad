"""Checkpoints of the released sizes without weights, and engines on the pretended device."""

from __future__ import annotations

import gc
import json
import os
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import (
    RELEASED,
    _config,
    _generation_config,
)
from vllm_diffusion.models.diffusion_gemma.testing.quantisable import plain_linears
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import (
    build_tokenizer,
    write_processor_files,
)
from vllm_diffusion.testing.json_file import write_json
from vllm_diffusion.testing.quantise import Form, quantisation_config

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_dry.graphs import Machine

COMMON: Final[dict[str, Any]] = {
    "load_format": "dummy",
    "disable_log_stats": True,
    "kernel_config": {
        "enable_flashinfer_autotune": False,
        "enable_jit_warmup": False,
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
    },
    "compilation_config": {
        "mode": 0,
        "custom_ops": ["none"],
        "cudagraph_mode": "FULL_DECODE_ONLY",
    },
}


ALIKE: Final = 6
"""Layers of a model whose layers are all alike."""

LONGEST: Final = {"diffusion_gemma": 8192, "sdar": 8192, "llada": 4096}
"""Positions of a request, by family."""


def released(folder: Path, family: str, form: Form | None = None) -> Path:
    """A folder that vLLM takes for a family's released model in this form, without weights."""
    made: dict[str, Any] = {
        "diffusion_gemma": _diffusion_gemma,
        "sdar": _sdar_8b,
        "llada": _llada_8b,
    }
    folder.mkdir(parents=True, exist_ok=True)
    made[family](folder, form)
    return folder


def _sdar_8b(folder: Path, form: Form | None) -> None:
    """SDAR-8B-Chat, with the sizes of Qwen3-8B but for the layers, which are all alike."""
    from vllm_diffusion.models.sdar.testing import checkpoint

    assert form is None
    checkpoint.make_tiny_checkpoint(folder, checkpoint.TinySpec(layers=1))
    spec = checkpoint.TinySpec(
        block=4,
        hidden=4096,
        layers=ALIKE,
        vocab=151936,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=12288,
        max_positions=32768,
        dtype="bfloat16",
    )
    write_json(folder / "config.json", checkpoint.released_config(spec))


def _llada_8b(folder: Path, form: Form | None) -> None:
    """LLaDA-8B-Instruct, but for the layers, which are all alike."""
    from vllm_diffusion.models.llada.testing import checkpoint

    assert form is None
    checkpoint.make_tiny_checkpoint(folder, checkpoint.TinySpec(layers=1))
    spec = checkpoint.TinySpec(
        hidden=4096,
        layers=ALIKE,
        vocab=126464,
        heads=32,
        kv_heads=32,
        intermediate=12288,
        max_positions=LONGEST["llada"],
        dtype="bfloat16",
    )
    write_json(folder / "config.json", checkpoint.released_config(spec))


def _diffusion_gemma(folder: Path, form: Form | None) -> None:
    import torch

    config = _config(RELEASED)
    config.dtype = torch.bfloat16
    config.architectures = ["DiffusionGemmaForBlockDiffusion"]
    if form is not None:
        plain = dict.fromkeys(
            (
                *(f"model.decoder.layers.{n}.router.proj.weight" for n in range(RELEASED.layers)),
                "model.decoder.self_conditioning.gate_proj.weight",
                "model.decoder.self_conditioning.up_proj.weight",
                "model.decoder.self_conditioning.down_proj.weight",
                "model.encoder.embed_vision.embedding_projection.weight",
                *_vision_linears(),
            ),
            torch.empty(1, 1),
        )
        config.quantization_config = quantisation_config(form, ignore=plain_linears(plain))
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", _generation_config(RELEASED))
    write_processor_files(
        folder, tokenizer=build_tokenizer(512), soft_tokens=RELEASED.soft_tokens, patch=16
    )


def _vision_linears() -> list[str]:
    inside = "model.encoder.vision_tower.encoder.layers.0"
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    return [f"{inside}.{name}.linear.weight" for name in names] + [
        "model.encoder.vision_tower.patch_embedder.input_proj.weight"
    ]


def start(machine: Machine, checkpoint: Path, *, images: bool | None, **options: Any) -> Any:
    """An `LLM` in this process; without a say on `images` where the family takes none."""
    del machine
    from vllm import LLM

    allowed = {"limit_mm_per_prompt": {"video": 0} if images else {"image": 0, "video": 0}}
    return LLM(str(checkpoint), **(COMMON | ({} if images is None else allowed) | options))


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def prepare_environment() -> None:
    """What must be set before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def worker_of(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker


def chosen(llm: Any) -> dict[str, list[str]]:
    """The attention backends, expert kernels and kernels of quantised layers by name."""
    from vllm.model_executor.layers.attention import Attention

    model = worker_of(llm).model_runner.model
    attention, experts, linear = set(), set(), set()
    for module in model.modules():
        if isinstance(module, Attention):
            name = module.get_attn_backend().get_name()
            version = vars(module.impl).get("vllm_flash_attn_version")
            attention.add(f"{name} {version}" if name == "FLASH_ATTN" else name)
        method = getattr(module, "quant_method", None)
        for field in ("unquantized_backend", "fp8_backend", "nvfp4_backend"):
            if method is not None and field in vars(method):
                experts.add(vars(method)[field].name)
        scheme = vars(module).get("scheme")
        for field in ("kernel", "fp8_linear"):
            if scheme is not None and field in vars(scheme):
                linear.add(type(vars(scheme)[field]).__name__)
    return {"attention": sorted(attention), "experts": sorted(experts), "linear": sorted(linear)}


def say(path: str, report: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(report, file, indent=1)
