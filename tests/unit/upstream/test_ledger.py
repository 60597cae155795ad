from __future__ import annotations

import dataclasses

import pytest

from vllm_diffusion.upstream import ledger


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(ledger, "_installed", {})


def row(name: str, log: list[str], *, applies: bool = True) -> ledger.Patch:
    return ledger.Patch(
        name=name,
        target="a.b",
        why="w",
        upstream_reference="u",
        remove_when="r",
        applies=lambda: applies,
        install=lambda: log.append(name),
        needed=lambda: True,
    )


def test_installs_in_order_and_reports_what_is_active():
    log: list[str] = []
    rows = [row("one", log), row("two", log, applies=False), row("three", log)]
    assert ledger.apply(rows) == ("one", "three")
    assert log == ["one", "three"]
    assert ledger.active() == ("one", "three")


def test_a_second_call_installs_nothing_again():
    log: list[str] = []
    rows = (row("one", log),)
    assert ledger.apply(rows) == ledger.apply(rows) == ("one",)
    assert log == ["one"]


def test_reports_only_the_rows_it_was_given():
    log: list[str] = []
    ledger.apply([row("one", log)])
    assert ledger.apply([row("two", log)]) == ("two",)
    assert ledger.active() == ("one", "two")


def test_two_patches_cannot_share_a_name():
    log: list[str] = []
    with pytest.raises(ValueError, match="'one'"):
        ledger.apply([row("one", log), row("one", log)])


def test_a_failing_install_is_not_remembered():
    log: list[str] = []

    def fail() -> None:
        raise RuntimeError("no")

    broken = dataclasses.replace(row("one", log), install=fail)
    with pytest.raises(RuntimeError, match="no"):
        ledger.apply([broken])
    assert ledger.active() == ()


def test_a_row_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row("one", []).name = "two"  # type: ignore[misc]
