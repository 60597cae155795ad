"""What a checkpoint would be served as, read from its files; no vLLM, and no weights are loaded."""

from __future__ import annotations

import json
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from vllm_diffusion.config import describe, served_rules
from vllm_diffusion.denoise.constants import KINDS
from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.models import FAMILIES, family_module

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_diffusion.family import FamilyModule


def as_served(folder: Path) -> str:
    """Family, canvas and decoding rule of a checkpoint, on one line.

    Raises:
        CheckpointError: it is no checkpoint, no family serves it, or its files do not say what its
            family must know. Options of a server, such as ``--hf-overrides``, are not known here.
    """
    values = _read(folder / "config.json")
    names = values.get("architectures") or []
    served = next((name for name in names if name in FAMILIES), None)
    if served is None:
        raise CheckpointError(
            f"{folder} is of architecture {', '.join(names) or 'unknown'}, which this plugin does "
            f"not serve; it serves {', '.join(FAMILIES)}"
        )
    module = family_module(served)
    file = folder / "generation_config.json"
    generation = _read(file) if file.exists() else {}
    config = _config(module, values, folder)
    family = module.declare(config, generation)
    rules, _ = served_rules(
        generation, source=str(file), kind=KINDS[family.rule], published=family.published
    )
    width = family.block or config.canvas_length
    return (
        f"{folder} is a {family.name}: canvases of {width} tokens, {family.text} "
        f"text, rule {family.rule} with {describe(rules.default, {})}"
    )


def _config(module: FamilyModule, values: dict[str, Any], folder: Path) -> Any:  # noqa: ANN401
    """The config as an object, of the family's own class where Transformers has none."""
    own = module.CONFIGS.get(str(values.get("model_type")))
    if own is not None:
        return resolve_name(own).from_dict(values)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"Transformers cannot read the config of {folder}: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    """An object of a JSON file."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no JSON object")
    return values
