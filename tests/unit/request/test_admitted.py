"""The record that the engine gets of a request, and what becomes of it there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.sampling import FAST, RULE, RULES, Sampling

from vllm_diffusion.constrain.constraints import Holes
from vllm_diffusion.request.admitted import Admitted, admitted
from vllm_diffusion.request.options import DiffusionParams
from vllm_diffusion.request.sampling import constraints
from vllm_diffusion.request.text import NOISE_LEVEL, CanvasText, Rows

END, TURN = 1, 2
TEMPLATE = Rows(
    seed_canvas=(97, -1, -1, -1, TURN, 0), pinned=(0, 4, 5), holes=Holes(shown=5, pad=0, end=-1)
)
DRAFT = Rows(seed_canvas=(97, TURN, 0))
WHOLE = DiffusionParams(
    preset="fast",
    constants={"max_steps": 7, "t_min": 0},
    seed_canvas=(4, 5, 6),
    pinned=(0, 2),
    noise_level=0.25,
    read_only=True,
    constrained=True,
    fused_commit=False,
    approximate_prefix=True,
    telemetry=True,
)


def test_a_request_without_options_is_what_the_engine_serves() -> None:
    assert admitted(DiffusionParams(), RULES) == Admitted(rule=RULE)


def test_every_option_reaches_the_record() -> None:
    assert admitted(WHOLE, RULES) == Admitted(
        rule=replace(FAST, max_steps=7, t_min=0),
        seed_canvas=(4, 5, 6),
        pinned=(0, 2),
        noise_level=0.25,
        read_only=True,
        constrained=True,
        fused_commit=False,
        approximate_prefix=True,
        telemetry=True,
    )


@pytest.mark.parametrize("rows", [None, TEMPLATE, DRAFT])
def test_a_record_survives_a_serializer_without_tuples(rows: Rows | None) -> None:
    record = admitted(WHOLE, RULES, rows)
    read = Admitted.from_wire(json.loads(json.dumps(record.to_wire())))
    assert read == record
    assert read.rule.t_min.__class__ is int, "a constant keeps its type, which a trace shows"


def test_rows_stand_for_a_text_and_only_a_draft_is_noisy_unasked() -> None:
    asked = DiffusionParams(text=CanvasText(template=("a", 3)))
    record = admitted(asked, RULES, TEMPLATE)
    assert (record.seed_canvas, record.pinned) == (TEMPLATE.seed_canvas, TEMPLATE.pinned)
    assert (record.holes, record.noise_level) == (TEMPLATE.holes, None)
    drafted = admitted(DiffusionParams(text=CanvasText(draft="a")), RULES, DRAFT)
    assert (drafted.holes, drafted.noise_level) == (None, NOISE_LEVEL)
    named = DiffusionParams(text=CanvasText(draft="a"), noise_level=0.25)
    assert admitted(named, RULES, DRAFT).noise_level == 0.25
    assert admitted(DiffusionParams(seed_canvas=(1,)), RULES).noise_level is None


def test_nothing_that_ends_an_answer_may_stand_in_a_hole() -> None:
    sampling = Sampling(all_stop_token_ids={END, TURN}, stop_token_ids=[TURN], eos_token_id=END)
    record = admitted(DiffusionParams(text=CanvasText(template=("a", 3))), RULES, TEMPLATE)
    asked = constraints(sampling, record)
    assert asked.holes == TEMPLATE.holes
    assert {token for token, last in asked.early if last >= 5} == {END, TURN}
