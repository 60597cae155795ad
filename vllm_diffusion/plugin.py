"""register(): the one function vLLM calls, early, in every process it starts.

Checks that the plugin is on and the version supported, applies the patches that this host needs,
and registers the architectures and, where Transformers has none, their config classes. Idempotent,
cheap, touches no device. What is active is logged in one line when a model of ours is about to be
served (``engine.serving``), because vLLM sets up its log only after this.
"""

from __future__ import annotations

import os
from pkgutil import resolve_name

from vllm_diffusion.models import FAMILIES, family_module, family_modules
from vllm_diffusion.patches.table import PATCHES
from vllm_diffusion.upstream import ledger
from vllm_diffusion.upstream.ledger import Stage
from vllm_diffusion.upstream.versions import require_supported_vllm, switched_off

_registered = False


def register() -> None:
    """Make vLLM serve the architectures of ``models.FAMILIES`` with this package.

    Does nothing when ``VLLM_DIFFUSION=0``.

    Raises:
        UnsupportedVllmError: the installed vLLM is outside the tested range.
    """
    global _registered  # noqa: PLW0603 - registered once per process
    if _registered or switched_off(os.environ):
        return
    require_supported_vllm()
    ledger.register(PATCHES)
    ledger.apply_stage(Stage.TORCH, Stage.PLUGIN)

    from transformers import AutoConfig
    from vllm import ModelRegistry

    for architecture in FAMILIES:
        # Passed as a string: the front end must not import model code.
        ModelRegistry.register_model(architecture, family_module(architecture).MODELS[architecture])
    for module in family_modules():
        for model_type, name in module.CONFIGS.items():
            # What is registered comes before remote code that config.json names, trusted or not.
            AutoConfig.register(model_type, resolve_name(name), exist_ok=True)
    _registered = True
