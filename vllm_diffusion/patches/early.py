"""The rows of `patches.py` that are installed before vLLM is imported."""

from __future__ import annotations

from functools import partial
from typing import Final

from vllm_diffusion.upstream import torch_companions
from vllm_diffusion.upstream.ledger import Patch

EARLY_PATCHES: Final = (
    Patch(
        name="torchvision-ops",
        target="torchvision._meta_registrations",
        why="torchvision from PyPI is a CUDA build; beside a CPU torch its library cannot load, "
        "and importing it dies on a missing operator.",
        upstream_reference="torchvision/_meta_registrations.py: register_fake without _has_ops()",
        remove_when="torchvision imports without its compiled library",
        applies=partial(torch_companions.cannot_load, "torchvision"),
        install=torch_companions.declare_torchvision_ops,
        needed=partial(torch_companions.fails_to_import, "torchvision"),
    ),
    Patch(
        name="torchaudio-absent",
        target="torchaudio",
        why="torchaudio from PyPI is a CUDA build; beside a CPU torch importing it raises OSError, "
        "and Transformers imports it for every processor.",
        upstream_reference="torchaudio/_extension/__init__.py: _load_lib",
        remove_when="torchaudio imports without its compiled library",
        applies=partial(torch_companions.cannot_load, "torchaudio"),
        install=partial(torch_companions.hide, "torchaudio"),
        needed=partial(torch_companions.fails_to_import, "torchaudio"),
    ),
    Patch(
        name="torchcodec-absent",
        target="torchcodec",
        why="torchcodec from PyPI is a CUDA build; beside a CPU torch importing it raises OSError, "
        "and vLLM's optional import of it expects ImportError or RuntimeError.",
        upstream_reference="vllm/multimodal/media/audio.py: import of torchcodec.decoders",
        remove_when="vLLM's optional import of torchcodec survives an OSError",
        applies=partial(torch_companions.cannot_load, "torchcodec"),
        install=partial(torch_companions.hide, "torchcodec"),
        needed=partial(torch_companions.fails_to_import, "torchcodec"),
    ),
)
"""Installed by `early.prepare_host` when torch is imported: no row may import more than torch."""
