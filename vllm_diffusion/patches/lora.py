"""LoRA adapters of a diffusion model: checked where a user asks for them, served by our manager.

vLLM loads an adapter in the forward that needs it first, and an adapter that does not fit ends the
engine there. Over HTTP it is loaded ahead, and what is wrong with it comes back as status 500. Both
doors ask our check first.

In a worker the runner makes its own manager of adapters, and experts are given Triton's kernel as
soon as LoRA is on, on a CPU too, and where no adapter may change them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vllm_diffusion.errors import AdapterError
from vllm_diffusion.upstream.cpu_host import is_diffusion, is_triton_free_cpu


def adapters_are_served() -> bool:
    """Whether this host can apply adapters: a GPU of vLLM's Triton kernels, or a CPU by ours."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike() or is_triton_free_cpu()


def check_adapters() -> None:
    """Make `InputProcessor._validate_lora` refuse an adapter that does not fit."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_lora

    @functools.wraps(original)
    def _validate_lora(self: Any, lora_request: Any) -> None:
        original(self, lora_request)
        if lora_request is None or not self.model_config.is_diffusion:
            return
        from vllm_diffusion.engine.lora.admission import check_request

        try:
            check_request(lora_request, self.model_config, self.lora_config)
        except AdapterError as error:
            raise VLLMValidationError(str(error)) from error

    InputProcessor._validate_lora = _validate_lora


def check_loaded_adapters() -> None:
    """Make `/v1/load_lora_adapter` and `--lora-modules` answer 400 to such an adapter."""
    from http import HTTPStatus

    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response
    from vllm.lora.request import LoRARequest

    original = OpenAIServingModels._check_load_lora_adapter_request

    @functools.wraps(original)
    async def _check_load_lora_adapter_request(self: Any, request: Any) -> Any:
        refusal = await original(self, request)
        config = self.engine_client.vllm_config
        if refusal is not None or not is_diffusion(config) or config.lora_config is None:
            return refusal
        from vllm_diffusion.engine.lora.admission import check_request

        adapter = LoRARequest(request.lora_name, 1, request.lora_path)
        try:
            check_request(adapter, config.model_config, config.lora_config)
        except AdapterError as error:
            return create_error_response(
                message=str(error),
                err_type="BadRequestError",
                status_code=HTTPStatus.BAD_REQUEST,
                param="lora_path",
            )
        return None

    OpenAIServingModels._check_load_lora_adapter_request = _check_load_lora_adapter_request


def take_adapters() -> None:
    """Make `LoRAModelRunnerMixin.load_lora_model` give a diffusion model our manager."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    original = LoRAModelRunnerMixin.load_lora_model

    @functools.wraps(original)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if not is_diffusion(vllm_config):
            return original(self, model, vllm_config, device)
        from vllm_diffusion.engine.lora.rows import CanvasAdapters

        self.lora_manager = model.adapters = CanvasAdapters(model, vllm_config, device)
        return model

    LoRAModelRunnerMixin.load_lora_model = load_lora_model


def choose_experts() -> None:
    """Make experts those of an engine without LoRA unless adapters change them; on a CPU, ours."""
    import dataclasses

    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    original = module.select_unquantized_moe_backend

    @functools.wraps(original)
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        vllm_config = get_current_vllm_config()
        if not moe_config.is_lora_enabled or not is_diffusion(vllm_config):
            return original(moe_config)
        from vllm_diffusion.engine.lora.admission import adapts_experts
        from vllm_diffusion.engine.lora.experts import AdaptedExperts

        lora = vllm_config.lora_config
        assert lora is not None
        if not adapts_experts(vllm_config.model_config, lora):
            return original(dataclasses.replace(moe_config, is_lora_enabled=False))
        if not is_triton_free_cpu():
            return original(moe_config)
        return UnquantizedMoeBackend.CPU, AdaptedExperts

    module.select_unquantized_moe_backend = select_unquantized_moe_backend


def adapters_are_loaded_unchecked() -> bool:
    """Whether `_validate_lora` still looks at no file."""
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(inspect.unwrap(InputProcessor._validate_lora))
    return "lora_request.lora_path" not in source


def refused_adapters_are_internal_errors() -> bool:
    """Whether an adapter that does not fit still is an internal error of the server."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    source = inspect.getsource(OpenAIServingModels.load_lora_adapter)
    return "INTERNAL_SERVER_ERROR" in source


def manager_is_fixed() -> bool:
    """Whether the runner still makes its manager itself."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    source = inspect.getsource(inspect.unwrap(LoRAModelRunnerMixin.load_lora_model))
    return "self.lora_manager = LRUCacheWorkerLoRAManager(" in source


def adapted_experts_are_triton() -> bool:
    """Whether LoRA still means Triton experts, whatever the platform."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    source = inspect.getsource(inspect.unwrap(unquantized.select_unquantized_moe_backend))
    adapted = source.partition("if moe_config.is_lora_enabled:")[2].partition("\n    # NOTE")[0]
    return "UnquantizedMoeBackend.TRITON" in adapted and "is_cpu" not in source
