"""Many cases in one test: a loop whose failures pytest's ``subtests`` tell apart.

Takes the cases by the name of a test's argument. Gives a test that runs every combination.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest


def for_each(**cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every combination of cases; one that fails is named and stops no other.

    For cases that differ by a seed, a size or a row of a table alone; ``parametrize`` is for those
    that are tests of their own. All cases share the fixtures of the one test, `tmp_path` and
    `monkeypatch` too. No case may skip: only what fails is told.
    """
    names, combinations = list(cases), list(itertools.product(*cases.values()))
    assert combinations, f"{names} have no cases"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(subtests: pytest.Subtests, **fixtures: Any) -> None:
            for values in combinations:
                case = dict(zip(names, values, strict=True))
                with subtests.test(**case):
                    test(**case, **fixtures)

        signature = inspect.signature(test)
        assert signature.parameters.keys() >= cases.keys(), f"the test does not take all of {names}"
        wanted = [p for name, p in signature.parameters.items() if name not in cases]
        given = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = signature.replace(
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [given, *wanted]]
        )
        return run

    return decorate
