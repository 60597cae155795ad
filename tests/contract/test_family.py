"""What every family's module offers, and that a declaration survives the way through a config."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from helpers.cases import for_each

from vllm_diffusion.family import Conditioning, Family, Text
from vllm_diffusion.models import FAMILIES, family_module, family_modules

pytestmark = pytest.mark.vllm


def test_a_declaration_survives_json() -> None:
    declared = Family(
        name="one",
        rule="reveal",
        mask_id=3,
        text=Text.BLOCK,
        block=4,
        conditioning=Conditioning.TIME,
        banned=(3,),
        ends=(1, 2),
        published={"max_steps": 4, "reveal_threshold": 0.85, "reveal_by": "drawn"},
    )
    assert Family.from_dict(json.loads(json.dumps(declared.to_dict()))) == declared
    assert len({declared, Family.from_dict(declared.to_dict())}) == 1


@for_each(architecture=FAMILIES)
def test_an_architecture_has_a_model_class(architecture: str) -> None:
    module, _, name = family_module(architecture).MODELS[architecture].partition(":")
    model = getattr(import_module(module), name)
    for asked in ("get_model_state_cls", "logits", "vocabulary", "compute_logits", "load_weights"):
        assert callable(getattr(model, asked))


def test_a_module_lists_the_architectures_that_name_it() -> None:
    for module in family_modules():
        named = {name for name, path in FAMILIES.items() if path == module.__name__}  # type: ignore[attr-defined]
        assert module.MODELS.keys() == named
