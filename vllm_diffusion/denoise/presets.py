"""Presets: named sets of rule constants.

A preset sets the constants that it names; the others come from the sources below it, see
``config``. To add one, add a row, measure it on hard items and keep it only if it pays there:

    benchmarks/quality.py --preset reference --preset NAME --sizes hard
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

REFERENCE: Final = "reference"
"""All constants as published; the default."""

PRESETS: Final[dict[str, Mapping[str, Any]]] = {
    REFERENCE: {},
    "balanced": {"entropy_bound": 0.05, "hold_threshold": 0.8, "doubt_threshold": 0.15},
    "fast": {"entropy_bound": 0.03, "hold_threshold": 0.8, "doubt_threshold": 0.3},
    "gentle": {"entropy_bound": 0.03},
}
"""Name -> constants of ``entropy_bound`` and their values."""
