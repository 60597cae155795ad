"""Rules to try: as a user writes them, and the neighbours of one."""

from __future__ import annotations

import pytest

from vllm_diffusion.denoise.constants import REVEAL_BY, EntropyBoundConstants, RevealConstants
from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.errors import TuneError
from vllm_diffusion.tune.arms import format_arm, neighbours, parse_arm

RULE = EntropyBoundConstants(
    max_steps=48,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.005,
    stability_threshold=1,
)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("reference", {"diffusion_preset": "reference"}),
        ("entropy_bound=0.3", {"diffusion_entropy_bound": 0.3}),
        (
            " preset=reference , max_steps=24",
            {"diffusion_preset": "reference", "diffusion_max_steps": 24},
        ),
        ("t_min=0", {"diffusion_t_min": 0}),
    ],
)
def test_an_arm_is_a_preset_and_constants(text, options):
    assert parse_arm(text) == options
    assert parse_arm(format_arm(options)) == options


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_an_arm(name):
    assert format_arm(parse_arm(name)) == name


def test_everything_wrong_with_an_arm_is_said():
    with pytest.raises(TuneError) as caught:
        parse_arm("quick,entropy_bound=much,max_steps=0,pace=3")
    for part in ("preset must be", "entropy_bound must be", "max_steps must be", "unknown 'pace'"):
        assert part in str(caught.value)


def test_neighbours_change_one_constant_and_can_be_served():
    found = list(neighbours({"diffusion_preset": "reference"}, RULE))
    assert {"diffusion_preset": "reference", "diffusion_entropy_bound": 0.2} in found
    assert {"diffusion_preset": "reference", "diffusion_max_steps": 24} in found
    assert {"diffusion_preset": "reference", "diffusion_stability_threshold": 0} in found
    for arm in found:
        assert len(arm) == 2
        (name,) = arm.keys() - {"diffusion_preset"}
        assert parse_arm(format_arm(arm)) == arm
        assert arm[name] != getattr(RULE, name.removeprefix("diffusion_"))


def test_a_neighbour_keeps_the_ramp_and_leaves_what_is_off():
    flat = EntropyBoundConstants(
        max_steps=1,
        t_min=0.5,
        t_max=0.5,
        entropy_bound=0.0,
        confidence_threshold=0.0,
        stability_threshold=0,
    )
    changes = [
        {name.removeprefix("diffusion_"): value for name, value in arm.items()}
        for arm in neighbours({}, flat)
    ]
    assert changes == [{"max_steps": 2}, {"t_min": 0.25}, {"t_max": 1.0}]


def test_a_choice_is_changed_for_every_other_that_can_be_served():
    arm, changes = {"diffusion_preset": "reference"}, []
    for threshold in (0.4, 0.0):
        rule = RevealConstants(max_steps=4, reveal_threshold=threshold, reveal_by="drawn")
        found = list(neighbours(arm, rule))
        assert [parse_arm(format_arm(each)) for each in found] == found
        changes.append([format_arm(each).removeprefix("reference,") for each in found])
    steps, by = ["max_steps=2", "max_steps=8"], [f"reveal_by={name}" for name in REVEAL_BY[1:]]
    assert changes[0] == [*steps, "reveal_threshold=0.2", "reveal_threshold=0.8", by[0], by[2]]
    assert changes[1] == steps + by


def test_a_changed_constant_is_changed_further():
    arms = list(neighbours({"diffusion_entropy_bound": 0.1}, RULE))
    assert {"diffusion_entropy_bound": 0.2} in arms
