"""Text on a canvas as rows: what stands where, what is held, and what cannot be."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_diffusion.constrain.constraints import Holes
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.request.text import (
    CanvasText,
    Frame,
    Rows,
    malformed_text,
    rows_of,
    text_contradictions,
)

PAD, END, TURN = 0, 1, 2
SPECIAL = {PAD: "<pad>", END: "<end>", TURN: "<turn>"}
FRAME = Frame(
    width=16,
    next_width=16,
    left=100,
    max_tokens=50,
    end=TURN,
    stops=(END, TURN),
    pad=PAD,
    skips_special=True,
)


class Letters:
    """A tokenizer of one id a letter that knows three special tokens and cannot write ~."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        for token, name in SPECIAL.items():
            text = text.replace(name, chr(token))
        return [ord("?" if letter == "~" else letter) for letter in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        special = dict.fromkeys(SPECIAL, "") if skip_special_tokens else SPECIAL
        return "".join(special.get(token, chr(token)) for token in ids)


def frame(**changes: Any) -> Frame:
    return replace(FRAME, **changes)


def rows(frame: Frame = FRAME, **text: Any) -> Rows:
    return rows_of(CanvasText(**text), Letters(), frame)


def refusal(frame: Frame = FRAME, **text: Any) -> str:
    with pytest.raises(ParamsError) as caught:
        rows(frame, **text)
    return str(caught.value)


def shown(rows: Rows) -> str:
    """The rows as letters: _ is a hole, . a pad, $ the end."""
    marks = {-1: "_", PAD: ".", TURN: "$"}
    return "".join(marks.get(token) or chr(token) for token in rows.seed_canvas)


def test_a_template_is_followed_by_its_end_and_pads() -> None:
    made = rows(template=("ab", 3, "c", 1, 2))
    assert shown(made) == "ab___c___$......"
    assert made.pinned == (0, 1, 5, *range(9, 16))
    assert made.holes == Holes(shown=10, pad=PAD, end=-1)


def test_a_template_fits_the_room_that_max_model_len_leaves() -> None:
    assert shown(rows(frame(left=7), template=("ab", 3))) == "ab___$."
    assert shown(rows(frame(left=6), template=("ab", 3))) == "ab___$"


def test_a_hole_of_any_size_is_refused_without_being_made():
    assert "(2 of text, 1000000000000 of holes" in refusal(template=("ab", 10**12))


@pytest.mark.parametrize("tight", [{"left": 5}, {"width": 5}, {"max_tokens": 5}], ids=str)
def test_a_template_that_does_not_fit_is_refused_with_the_numbers(tight: dict[str, int]) -> None:
    fits = frame(**{name: value + 1 for name, value in tight.items()})
    assert len(rows(fits, template=("ab", 3)).seed_canvas) >= 6
    message = refusal(frame(**tight), template=("ab", 3))
    assert "needs 6 tokens (2 of text, 3 of holes, 1 for the end)" in message
    for number in (frame(**tight).width, frame(**tight).left, frame(**tight).max_tokens):
        assert str(number) in message


def test_text_that_would_not_come_out_as_it_went_in_is_refused() -> None:
    message = refusal(template=("a~", 1, "<pad>x", 1, "b<end>"))
    assert "writes 'a~' as 'a?'" in message
    assert "writes '<pad>x' as 'x'" in message
    assert "'b<end>' holds the ids [1], which end an answer" in message
    # Special tokens that are shown come out too; those that end an answer never do.
    frame_of_all = frame(skips_special=False)
    assert shown(rows(frame_of_all, template=("<pad>x", 1))).startswith(".x_$")
    assert "[2], which end" in refusal(frame_of_all, template=("<turn>",))


def test_a_suffix_stands_behind_a_hole_of_max_tokens() -> None:
    made = rows(frame(max_tokens=4), suffix="xyz")
    assert shown(made) == "____xyz$........"
    assert made.pinned == tuple(range(4, 16))
    assert made.holes == Holes(shown=4, pad=PAD, end=TURN)


def test_as_much_of_a_suffix_as_fits() -> None:
    assert shown(rows(frame(max_tokens=13), suffix="uvwxyz")) == "_" * 13 + "uvw"
    assert shown(rows(frame(max_tokens=15, left=16), suffix="uvwxyz")) == "_" * 15 + "u"
    for tight in ({"max_tokens": 16}, {"max_tokens": 9, "left": 9}):
        message = refusal(frame(**tight), suffix="u")
        assert f"max_tokens is {tight['max_tokens']}, the canvas has 16" in message


def test_a_draft_fills_whole_canvases() -> None:
    made = rows(draft="abc")
    assert shown(made) == "abc$............"
    assert made.pinned == ()
    assert made.holes is None
    assert shown(rows(draft="a" * 15)) == "a" * 15 + "$"
    assert shown(rows(draft="a" * 16)) == "a" * 16 + "$" + "." * 15


def test_the_first_canvas_of_a_grid_is_what_is_left_of_a_block() -> None:
    first = frame(width=5, next_width=8)
    assert shown(rows(first, draft="abcd")) == "abcd$"
    assert shown(rows(first, draft="abcde")) == "abcde$" + "." * 7
    assert shown(rows(first, template=("ab", 2))) == "ab__$"
    for text in ({"template": ("ab", 3)}, {"suffix": "u"}):
        assert "the first canvas, which ends with its block of 8, has 5" in refusal(first, **text)


def test_without_a_pad_the_end_is_repeated_and_no_slack_is_known() -> None:
    made = rows(frame(pad=None), template=("ab", 3))
    assert shown(made) == "ab___$$$$$$$$$$$"
    assert made.holes == Holes(shown=6, pad=-1, end=-1)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    assert "names no end" in refusal(frame(end=None), template=("ab", 3))


def test_random_templates_hold_their_text() -> None:
    rng = random.Random(2)
    for _ in range(300):
        template = tuple(
            rng.choice(["", "a", "bc", "def", 1, 2, 3]) for _ in range(rng.randint(1, 6))
        )
        need = sum(part if isinstance(part, int) else len(part) for part in template) + 1
        if need > 16:
            assert f"needs {need} tokens" in refusal(template=template)
            continue
        made = rows(template=template)
        expected = "".join("_" * part if isinstance(part, int) else part for part in template)
        assert shown(made) == (expected + "$").ljust(16, ".")
        assert set(made.pinned) == {at for at, token in enumerate(made.seed_canvas) if token >= 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("template", value)
            for value in ([], "ab", 3, None, [0], [-1], [True], [1.0], ["\ud800"])
        ],
        *[("suffix", value) for value in ("", 1, None, ["a"], "\ud800", "a" * (1 << 18))],
        *[("draft", value) for value in ("", 1, None)],
        *[("noise_level", value) for value in (0, -0.5, 1.5, "0.5", True, float("nan"), None)],
    ],
    ids=lambda value: repr(value)[:20],
)
def test_malformed_values_are_told_what_they_must_be(field: str, value: object) -> None:
    assert malformed_text(field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("template", ["a", 1]),
        ("template", (3,)),
        ("suffix", "🙂"),
        ("draft", " "),
        ("noise_level", 1),
        ("noise_level", 1e-9),
    ],
)
def test_well_formed_values_pass(field: str, value: object) -> None:
    assert malformed_text(field, value) is None


def problems(*, ignore_eos: bool = False, min_tokens: int = 0, **wishes: Any) -> list[str]:
    sampling = SimpleNamespace(ignore_eos=ignore_eos, min_tokens=min_tokens)
    rest = {
        "seed_canvas": wishes.pop("seed_canvas", ()),
        "noise_level": wishes.pop("noise_level", None),
        "read_only": wishes.pop("read_only", False),
    }
    return text_contradictions(sampling, CanvasText(**wishes), **rest)


def test_contradictions_are_all_named() -> None:
    assert problems() == []
    assert problems(draft="a", noise_level=0.5, read_only=True, ignore_eos=True) == []
    assert problems(seed_canvas=(1,), noise_level=0.5) == []
    (both,) = problems(draft="a", seed_canvas=(1,))
    assert both.startswith("diffusion_draft, diffusion_seed_canvas each say")
    (alone,) = problems(noise_level=0.5)
    assert "needs a diffusion_draft or a diffusion_seed_canvas" in alone
    two = problems(template=(1,), suffix="a", ignore_eos=True, min_tokens=3, read_only=True)
    assert "diffusion_template, diffusion_suffix each say" in two[0]
    assert two[1].endswith("excludes diffusion_read_only, ignore_eos, min_tokens=3")
