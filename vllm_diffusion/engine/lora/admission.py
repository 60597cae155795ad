"""What of vLLM's LoRA is served, and whether an adapter fits: asked where a user talks to vLLM.

An adapter that a worker cannot load would end the engine, since vLLM loads it in the step that
needs it first. So it is checked here, where a refusal is an answer. The worker's side is
``engine.lora.slots``.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.lora.form import AdapterBase
from vllm_diffusion.engine.lora.peft import CONFIG, WEIGHTS, check_adapter
from vllm_diffusion.errors import AdapterError, ConfigError
from vllm_diffusion.upstream.cpu_host import adapters_are_served, is_triton_free_cpu

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest

    from vllm_diffusion.engine.lora.form import AdapterForm

logger = init_logger(f"vllm.{__name__}")

_REFUSED = (
    "fully_sharded_loras",
    "enable_tower_connector_lora",
    "default_mm_loras",
    "enable_mixed_moe_lora_format",
    "enable_moe_shared_loras",
    "specialize_active_lora",
)

# What vLLM's Triton kernels for adapters assert.
_KERNEL_DTYPES = {torch.bfloat16, torch.float16}

# Files that have passed, by what they were checked against: a process may have several engines.
_fitting: set[tuple[object, ...]] = set()


def check_options(lora: LoRAConfig | None) -> None:
    """Raise `ConfigError` for adapter options that are not served.

    Args:
        lora: None where LoRA is off.
    """
    if lora is None:
        return
    if asked := [name for name in _REFUSED if getattr(lora, name)]:
        raise ConfigError(f"{', '.join(asked)} is not supported for a diffusion model: remove it.")


def check_host(vllm_config: VllmConfig) -> None:
    """Raise `ConfigError` where adapters cannot be applied: by this host, or to these experts."""
    lora, model = vllm_config.lora_config, vllm_config.model_config
    if lora is None:
        return
    if not adapters_are_served():
        raise ConfigError(
            "enable_lora is not supported for a diffusion model on this host, only on GPUs and on "
            "CPU hosts without a Triton backend: merge the adapter into the checkpoint instead."
        )
    adapter_form(model)
    if vllm_config.parallel_config.enable_expert_parallel and adapts_experts(model, lora):
        raise ConfigError(
            "enable_expert_parallel does not go with adapters of experts: add "
            "--lora-target-modules without experts, or use tensor parallelism alone."
        )
    if is_triton_free_cpu():
        return
    logger.warning(
        "Adapters of a diffusion model have not been tried on a GPU: hold what this one answers "
        "against the adapter merged into the checkpoint. docs/lora.md says what has been tested."
    )
    dtypes = {model.dtype, lora.lora_dtype} - {"auto", None}
    if len(dtypes) > 1 or not dtypes <= _KERNEL_DTYPES:
        raise ConfigError(
            f"the kernels that apply adapters on a GPU take bfloat16 or float16, the same for "
            f"model and adapters; got {model.dtype} and {lora.lora_dtype}."
        )


def adapter_form(model: ModelConfig) -> AdapterForm:
    """How adapters of the served family are written.

    Raises:
        ConfigError: none are served.
    """
    family = carriers.served(model.hf_config).family
    if family.adapters is None:
        raise ConfigError(
            f"enable_lora is not supported for {family.name}: merge the adapter into the "
            "checkpoint instead."
        )
    form: AdapterForm = resolve_name(family.adapters)
    return form


def adapter_base(model: ModelConfig, lora: LoRAConfig) -> AdapterBase:
    """What an adapter has to fit."""
    return AdapterBase.of(
        adapter_form(model),
        model.hf_text_config,
        name=model.model,
        max_rank=lora.max_lora_rank,
        targets=None if lora.target_modules is None else frozenset(lora.target_modules),
        fixed_experts=model.quantization is not None,
    )


def adapts_experts(model: ModelConfig, lora: LoRAConfig) -> bool:
    """Whether an adapter may change the experts of some layer."""
    base = adapter_base(model, lora)
    return any(matrix.experts and base.serves(name) for name, matrix in base.matrices.items())


def check_request(request: LoRARequest, model: ModelConfig, lora: LoRAConfig) -> None:
    """Raise `AdapterError` if the adapter of a request cannot be served.

    A file that has passed is not read again until it changes.
    """
    from vllm.lora.utils import get_adapter_absolute_path  # loads layers

    folder = Path(get_adapter_absolute_path(request.lora_path))
    if not folder.is_dir():
        raise AdapterError(f"the adapter {request.lora_name!r} is not at {request.lora_path}.")
    base = adapter_base(model, lora)
    if (times := _changed(folder)) is None:
        check_adapter(folder, base)  # says which file is missing
        return
    passed = (folder, *times, base.name, base.max_rank, base.targets)
    if passed not in _fitting:
        coverage = check_adapter(folder, base)
        if (remark := base.form.remark(request.lora_name, coverage)) is not None:
            logger.log(remark.level, remark.text)
        _fitting.add(passed)


def _changed(folder: Path) -> tuple[int, int] | None:
    """When the two files of an adapter were changed last, in ns; None if one is missing."""
    try:
        config, weights = ((folder / name).stat().st_mtime_ns for name in (CONFIG, WEIGHTS))
    except OSError:
        return None
    return config, weights
