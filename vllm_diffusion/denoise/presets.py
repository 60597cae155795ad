"""Presets: named sets of rule constants.

A preset sets the constants that it names; the others come from the sources below it, see
``config``. The names are the same for every kind of rule. To add one, add a row for every kind,
measure it on hard items and keep it only if it pays there:

    benchmarks/quality.py --preset reference --preset NAME --sizes hard
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

REFERENCE: Final = "reference"
"""All constants as published; the default."""

PRESETS: Final[dict[str, dict[str, Mapping[str, Any]]]] = {
    "entropy_bound": {
        REFERENCE: {},
        "balanced": {"entropy_bound": 0.05, "hold_threshold": 0.8, "doubt_threshold": 0.15},
        "fast": {"entropy_bound": 0.03, "hold_threshold": 0.8, "doubt_threshold": 0.3},
        "gentle": {"entropy_bound": 0.03},
    },
    # Judged on examples/tiny-sdar and examples/tiny-llada, see their READMEs; no released model has
    # been tried. They name the confidence that a request's temperature and cuts do not change.
    "reveal": {
        REFERENCE: {},
        "balanced": {"reveal_threshold": 0.9, "reveal_by": "model"},
        "fast": {"reveal_threshold": 0.7, "reveal_by": "model"},
        "gentle": {"reveal_threshold": 0.0},
    },
}
"""Kind of rule -> name -> constants and their values."""


def preset_names() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(dict.fromkeys(name for presets in PRESETS.values() for name in presets))
