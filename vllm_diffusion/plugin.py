"""register(): the one function vLLM calls, early, in every process it starts.

Decide whether to be active, check the version, apply the patches that this host needs, take the
architecture, say so in one line. Safe to call again; cheap; touches no device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import Final

from vllm_diffusion import __version__
from vllm_diffusion.upstream import ledger
from vllm_diffusion.upstream.patches import PATCHES
from vllm_diffusion.upstream.versions import require_supported_vllm, switched_off

MODELS: Final = {
    "DiffusionGemmaForBlockDiffusion": (
        "vllm_diffusion.models.diffusion_gemma.model:DiffusionGemmaForBlockDiffusion"
    ),
}
"""Architectures we serve, as lazy references: the front end must not import model code."""

# Under vLLM's logger, which is configured before plugins load; ours would print nothing.
_logger = logging.getLogger(f"vllm.{__name__}")
_registered = False


def register() -> None:
    """Make vLLM serve the architectures of ``MODELS`` with this package.

    Does nothing when ``VLLM_DIFFUSION=0``.

    Raises:
        UnsupportedVllmError: the installed vLLM is outside the tested range.
    """
    global _registered  # noqa: PLW0603 - one flag per process is what "once" means
    if _registered or switched_off(os.environ):
        return
    version = require_supported_vllm()
    active = ledger.apply(PATCHES)

    from vllm import ModelRegistry

    for architecture, reference in MODELS.items():
        ModelRegistry.register_model(architecture, reference)
    _registered = True
    if multiprocessing.parent_process() is None:
        _logger.info(
            "vllm-diffusion %s serves %s on vLLM %s with patches %s; VLLM_DIFFUSION=0 turns it off",
            __version__,
            ", ".join(MODELS),
            version,
            ", ".join(active),
        )
