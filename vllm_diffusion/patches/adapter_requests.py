"""A LoRA adapter that does not fit is refused where a user asks for it.

vLLM loads an adapter in the forward that needs it first, and an adapter that does not fit ends the
engine there. Over HTTP it is loaded ahead, and what is wrong with it comes back as status 500. Both
ask our check first.
"""

from __future__ import annotations

import inspect
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm_diffusion.errors import AdapterError
from vllm_diffusion.upstream.runner import is_diffusion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def check_requests(validate: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Make `InputProcessor._validate_lora` refuse an adapter that does not fit."""
    from vllm.exceptions import VLLMValidationError

    def checked(self: Any, lora_request: Any) -> None:
        validate(self, lora_request)
        if lora_request is None or not self.model_config.is_diffusion:
            return
        from vllm_diffusion.engine.lora.admission import check_request

        try:
            check_request(lora_request, self.model_config, self.lora_config)
        except AdapterError as error:
            raise VLLMValidationError(str(error)) from error

    return checked


def check_loading(check: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make `/v1/load_lora_adapter` and `--lora-modules` answer 400 to such an adapter.

    Wraps `OpenAIServingModels._check_load_lora_adapter_request`.
    """
    from vllm.entrypoints.serve import create_error_response
    from vllm.lora.request import LoRARequest

    async def checked(self: Any, request: Any) -> Any:
        refusal = await check(self, request)
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

    return checked


def adapters_are_checked_late() -> bool:
    """Whether vLLM still looks at no file first, and answers 500 where it then cannot load one."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.input_processor import InputProcessor

    validated = inspect.getsource(inspect.unwrap(InputProcessor._validate_lora))
    loaded = inspect.getsource(OpenAIServingModels.load_lora_adapter)
    return "lora_request.lora_path" not in validated and "INTERNAL_SERVER_ERROR" in loaded
