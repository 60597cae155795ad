from __future__ import annotations

import asyncio
import dataclasses
import inspect
import sys
import types

import pytest

from vllm_diffusion.upstream import ledger
from vllm_diffusion.upstream.ledger import Patch, Stage


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(ledger, "_registered", {})
    monkeypatch.setattr(ledger, "_installed", {})


@pytest.fixture
def library(monkeypatch):
    """A library to patch, `stock`, and a module of wrappers and installers, `ours`."""

    class Base:
        def inherited(self):
            return "inherited"

    class Model(Base):
        def method(self, words: int) -> str:
            """Of the library."""
            return f"stock {words}"

        @property
        def choice(self):
            return "stock"

        @classmethod
        def kind(cls):
            return f"stock {cls.__name__}"

        @staticmethod
        def size():
            return "stock"

        async def answer(self):
            return "stock"

    stock, ours = types.ModuleType("stock"), types.ModuleType("ours")
    stock.Model, stock.Base, stock.limit, stock.log = Model, Base, 1, []

    def wrap(original):
        return lambda *arguments: f"ours of {original(*arguments)}"

    def wrap_answer(original):
        async def answer(self):
            return f"ours of {await original(self)}"

        return answer

    def fail(*_):
        raise RuntimeError("no")

    ours.wrap, ours.wrap_answer, ours.fail = wrap, wrap_answer, fail
    ours.derive = lambda model: type("Ours", (model,), {})
    ours.double = lambda limit: 2 * limit
    for name in ("one", "two", "three"):
        setattr(ours, name, lambda name=name: stock.log.append(name))
    ours.yes = lambda: True
    monkeypatch.setitem(sys.modules, "stock", stock)
    monkeypatch.setitem(sys.modules, "ours", ours)
    return stock


def row(name: str, **fields: object) -> Patch:
    if "wraps" not in fields:
        fields = {"installs": {"stock": f"ours:{name}"}} | fields
    known = {"stage": Stage.PLUGIN, "why": "w", "upstream_reference": "u", "remove_when": "r"}
    return Patch(name=name, needed="ours:yes", **(known | fields))


def test_a_method_is_replaced_by_what_wraps_it(library):
    before = inspect.signature(library.Model.method)
    ledger.apply([row("one", wraps={"stock:Model.method": "ours:wrap"})])
    assert library.Model().method(3) == "ours of stock 3"
    assert inspect.signature(library.Model.method) == before
    assert library.Model.method.__doc__ == "Of the library."


def test_a_property_stays_a_property_and_methods_without_self_stay_what_they_are(library):
    names = ("choice", "kind", "size")
    kinds = [type(inspect.getattr_static(library.Model, name)) for name in names]
    ledger.apply([row("one", wraps={f"stock:Model.{name}": "ours:wrap" for name in names})])
    assert [type(inspect.getattr_static(library.Model, name)) for name in names] == kinds
    assert library.Model().choice == library.Model.size() == "ours of stock"
    assert library.Model.kind() == "ours of stock Model"


def test_a_coroutine_function_stays_one(library):
    ledger.apply([row("one", wraps={"stock:Model.answer": "ours:wrap_answer"})])
    assert inspect.iscoroutinefunction(library.Model.answer)
    assert asyncio.run(library.Model().answer()) == "ours of stock"


def test_an_inherited_method_is_replaced_where_the_row_says(library):
    ledger.apply([row("one", wraps={"stock:Model.inherited": "ours:wrap"})])
    assert library.Model().inherited() == "ours of inherited"
    assert library.Base().inherited() == "inherited"


def test_a_class_and_a_value_are_replaced_as_they_are(library):
    stock = library.Model
    ledger.apply([row("one", wraps={"stock:Model": "ours:derive", "stock:limit": "ours:double"})])
    assert library.Model.__mro__[1] is stock
    assert library.limit == 2


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("nowhere:Model", ImportError),
        ("stock:Other.method", AttributeError),
        ("stock:Model.gone", AttributeError),
    ],
)
def test_a_target_that_is_gone_is_an_error(library, target, error):
    broken = row("one", wraps={"stock:Model.method": "ours:wrap", target: "ours:wrap"})
    with pytest.raises(error):
        ledger.apply([broken])
    assert library.Model().method(3) == "stock 3"


def test_installs_in_order_and_reports_what_is_active(library):
    rows = [row("one"), row("two", applies=lambda: False), row("three")]
    assert ledger.apply(rows) == ("one", "three")
    assert library.log == ["one", "three"]
    assert ledger.active() == ("one", "three")


def test_a_second_call_installs_nothing_again(library):
    rows = (row("one"),)
    assert ledger.apply(rows) == ledger.apply(rows) == ("one",)
    assert library.log == ["one"]


def test_reports_only_the_rows_it_was_given(library):
    ledger.apply([row("one")])
    assert ledger.apply([row("two")]) == ("two",)
    assert ledger.active() == ("one", "two") == tuple(library.log)


def test_a_stage_is_installed_by_name(library):
    rows = [row("one", stage=Stage.SERVING), row("two"), row("three", stage=Stage.SERVING)]
    ledger.register(rows)
    ledger.register(rows)
    assert library.log == []
    assert ledger.apply_stage(Stage.SERVING) == ("one", "three")
    assert library.log == ["one", "three"]


def test_a_stage_that_nobody_registered_is_an_error():
    with pytest.raises(RuntimeError, match="SERVING"):
        ledger.apply_stage(Stage.SERVING)


def test_two_patches_cannot_share_a_name():
    for known in (ledger.register, ledger.apply):
        with pytest.raises(ValueError, match="'one'"):
            known([row("one", applies=lambda: False), row("one")])


@pytest.mark.parametrize(
    "fields", [{"installs": {"stock": "ours:fail"}}, {"wraps": {"stock:Model.method": "ours:fail"}}]
)
def test_a_failing_install_is_not_remembered(library, fields):
    with pytest.raises(RuntimeError, match="no"):
        ledger.apply([row("one", **fields)])
    assert ledger.active() == () == tuple(library.log)


@pytest.mark.usefixtures("library")
def test_whether_a_patch_is_needed_is_asked_by_name():
    assert row("one").is_needed()


def test_a_row_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row("one").name = "two"  # type: ignore[misc]
