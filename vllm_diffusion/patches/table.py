"""THE TABLE: every patch on vLLM, in the order they are installed.

To add one: write a function that takes what is replaced and returns its replacement, in a file of
its own here; add a row that names both; and a contract test of the target's signature in
`tests/contract/`. What the `needed` of a row names is written next to its wrapper. A row is data:
importing the table imports no wrapper, no vLLM and no torch.

The rows of a serving process, which check requests and complete answers, are in `serving_table.py`.
A family brings its own, in its folder below `models`.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from vllm_diffusion.models import family_modules
from vllm_diffusion.patches.serving_table import SERVING_PATCHES
from vllm_diffusion.upstream.cpu_host import adapters_are_served, is_triton_free_cpu
from vllm_diffusion.upstream.ledger import Patch, Stage
from vllm_diffusion.upstream.torch_companions import cannot_load

PATCHES: Final = (
    Patch(
        name="torchvision-ops",
        stage=Stage.TORCH,
        installs={
            "torchvision._meta_registrations": "vllm_diffusion.patches.host:declare_torchvision_ops"
        },
        why="torchvision from PyPI is a CUDA build; beside a CPU torch its library cannot load, "
        "and importing it dies on a missing operator.",
        upstream_reference="torchvision/_meta_registrations.py: register_fake without _has_ops()",
        remove_when="torchvision imports without its compiled library",
        applies=partial(cannot_load, "torchvision"),
        needed="vllm_diffusion.patches.host:torchvision_fails_to_import",
    ),
    Patch(
        name="torchaudio-absent",
        stage=Stage.TORCH,
        installs={"torchaudio": "vllm_diffusion.patches.host:hide_torchaudio"},
        why="torchaudio from PyPI is a CUDA build; beside a CPU torch importing it raises OSError, "
        "and Transformers imports it for every processor.",
        upstream_reference="torchaudio/_extension/__init__.py: _load_lib",
        remove_when="torchaudio imports without its compiled library",
        applies=partial(cannot_load, "torchaudio"),
        needed="vllm_diffusion.patches.host:torchaudio_fails_to_import",
    ),
    Patch(
        name="torchcodec-absent",
        stage=Stage.TORCH,
        installs={"torchcodec": "vllm_diffusion.patches.host:hide_torchcodec"},
        why="torchcodec from PyPI is a CUDA build; beside a CPU torch importing it raises OSError, "
        "and vLLM's optional import of it expects ImportError or RuntimeError.",
        upstream_reference="vllm/multimodal/media/audio.py: import of torchcodec.decoders",
        remove_when="vLLM's optional import of torchcodec survives an OSError",
        applies=partial(cannot_load, "torchcodec"),
        needed="vllm_diffusion.patches.host:torchcodec_fails_to_import",
    ),
    # ---- in every process that vLLM starts ----
    Patch(
        name="runner-refusal",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.config.vllm:VllmConfig._validate_v1_model_runner": (
                "vllm_diffusion.patches.runner_choice:explain_refusal"
            )
        },
        why="the refusal of a diffusion model on Model Runner V1 does not say why it is on V1.",
        upstream_reference="vllm/config/vllm.py: _validate_v1_model_runner",
        remove_when="vLLM's own refusal names VLLM_USE_V2_MODEL_RUNNER",
        needed="vllm_diffusion.patches.runner_choice:refusal_is_unexplained",
    ),
    Patch(
        name="cpu-runner-choice",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.config.vllm:VllmConfig.use_v2_model_runner": (
                "vllm_diffusion.patches.runner_choice:allow_choice"
            )
        },
        why="on a CPU host without Triton vLLM picks Model Runner V1, which runs no diffusion.",
        upstream_reference="vllm/config/vllm.py: use_v2_model_runner",
        remove_when="the choice of runner no longer asks for Triton on CPU",
        applies=is_triton_free_cpu,
        needed="vllm_diffusion.patches.runner_choice:choice_asks_for_triton",
    ),
    Patch(
        name="cpu-runner-validation",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.config.vllm:VllmConfig._validate_v2_model_runner": (
                "vllm_diffusion.patches.runner_choice:allow_validation"
            )
        },
        why="on a CPU host without Triton vLLM 0.32 refuses Model Runner V2 even when asked to.",
        upstream_reference="vllm/config/vllm.py: _validate_v2_model_runner (check gone in 0.33)",
        remove_when="the lowest tested vLLM is 0.33",
        applies=is_triton_free_cpu,
        needed="vllm_diffusion.patches.runner_choice:validation_asks_for_triton",
    ),
    Patch(
        name="cpu-worker",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.platforms.cpu:CpuPlatform.check_and_update_config": (
                "vllm_diffusion.patches.worker_choice:choose_worker"
            )
        },
        why="the worker of a diffusion model must get stand-ins for Triton kernels before its "
        "first step, and vLLM's own hook for that does not know which model is served.",
        upstream_reference="vllm/platforms/cpu.py: register_triton_kernel_overrides",
        remove_when="vLLM registers CPU versions of Model Runner V2's kernels itself",
        applies=is_triton_free_cpu,
        needed="vllm_diffusion.patches.cpu_kernels:are_needed",
    ),
    Patch(
        name="request-validation",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.sampling_params:SamplingParams._validate_diffusion": (
                "vllm_diffusion.patches.request_validation:check_parameters"
            )
        },
        why="vLLM refuses parameters that a canvas can honour, such as seed, and lets others "
        "through that it then ignores.",
        upstream_reference="vllm/sampling_params.py: _validate_diffusion",
        remove_when="a model class can validate its own requests",
        needed="vllm_diffusion.patches.request_validation:seed_is_refused",
    ),
    Patch(
        name="structured-outputs",
        stage=Stage.PLUGIN,
        wraps={
            "vllm.sampling_params:SamplingParams._validate_structured_outputs": (
                "vllm_diffusion.patches.request_validation:check_constraint"
            )
        },
        why="vLLM refuses every constraint of a diffusion model, since a mask that reads from left "
        "to right cannot constrain a canvas.",
        upstream_reference="vllm/sampling_params.py: _validate_structured_outputs",
        remove_when="a model class can say that it takes constraints, and check them",
        needed="vllm_diffusion.patches.request_validation:constraints_are_refused",
    ),
    Patch(
        name="serving-config",
        stage=Stage.PLUGIN,
        installs={
            "vllm.model_executor.models.config:MODELS_CONFIG_MAP": (
                "vllm_diffusion.patches.serving_config:install_serving_config"
            )
        },
        why="scheduler and limits of an out-of-tree model have to be set before the engine starts.",
        upstream_reference="vllm/model_executor/models/config.py: MODELS_CONFIG_MAP",
        remove_when="a registered model class can bring its own config hook",
        needed="vllm_diffusion.patches.serving_config:hooks_are_in_a_table",
    ),
    *SERVING_PATCHES,
    *(patch for family in family_modules() for patch in family.PATCHES),
    # ---- in the worker of a diffusion model ----
    Patch(
        name="placeholder-next-power-of-2",
        stage=Stage.WORKER,
        installs={
            "vllm.triton_utils:triton": "vllm_diffusion.patches.cpu_kernels:complete_placeholder"
        },
        why="Model Runner V2 calls triton.next_power_of_2 on the host to size blocks; vLLM's "
        "placeholder for triton lacks it.",
        upstream_reference="vllm/triton_utils/importing.py: TritonPlaceholder",
        remove_when="TritonPlaceholder has next_power_of_2",
        applies=is_triton_free_cpu,
        needed="vllm_diffusion.patches.cpu_kernels:placeholder_is_incomplete",
    ),
    Patch(
        name="model-runner-kernels",
        stage=Stage.WORKER,
        installs={"vllm.v1.worker.gpu": "vllm_diffusion.patches.cpu_kernels:install"},
        why="Model Runner V2 launches Triton kernels every step; without a backend there are none. "
        "cpu_kernels.stand_ins lists those that are replaced.",
        upstream_reference="vllm/triton_utils/dispatcher.py: register_kernels",
        remove_when="vLLM registers CPU versions of Model Runner V2's kernels itself",
        applies=is_triton_free_cpu,
        needed="vllm_diffusion.patches.cpu_kernels:are_needed",
    ),
    Patch(
        name="lora-manager",
        stage=Stage.ADAPTERS,
        wraps={
            "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
                "vllm_diffusion.patches.adapter_layers:bring_manager"
            )
        },
        why="vLLM's adapters know one kind of row per request, and on a CPU they apply another "
        "request's adapter to rows that have none.",
        upstream_reference="vllm/v1/worker/lora_model_runner_mixin.py: load_lora_model; "
        "vllm/lora/ops/torch_ops/lora_ops.py: index -1",
        remove_when="a model class can bring its own manager of adapters",
        applies=adapters_are_served,
        needed="vllm_diffusion.patches.adapter_layers:manager_is_fixed",
    ),
    Patch(
        name="lora-experts",
        stage=Stage.ADAPTERS,
        wraps={
            "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
            "select_unquantized_moe_backend": "vllm_diffusion.patches.adapter_layers:choose_experts"
        },
        why="with LoRA on, vLLM computes experts by Triton on every platform, adapted or not.",
        upstream_reference="vllm/model_executor/layers/fused_moe/oracle/unquantized.py: "
        "is_lora_enabled",
        remove_when="vLLM has experts for CPUs that adapters can change, and keeps its choice for "
        "experts that none does",
        applies=adapters_are_served,
        needed="vllm_diffusion.patches.adapter_layers:adapted_experts_are_triton",
    ),
)
