r"""Text on a canvas: a template with holes, a suffix, a draft, and the rows of ids they become.

    template   ["Name: ", 4, "\nCity: ", 6]    fixed text, and holes with a budget of tokens
    suffix     "\n    return total"            what follows behind a hole of max_tokens
    draft      "The sky is green."             what the canvas begins with, partly noise

Takes a text that stands in a request's options and the tokenizer. Gives ``Rows``: text becomes ids
where the tokenizer is, in the process that the client talks to.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from vllm_diffusion.constrain.constraints import Holes
from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

TEXTS: Final = ("template", "suffix", "draft")
"""The options of a request that hold text, without their prefix."""

TEXT_OPTIONS: Final = (*TEXTS, "noise_level")
"""All options that are read here."""

NOISE_LEVEL: Final = 0.5
"""Share of noise in a draft whose request names none."""

MAX_CHARACTERS: Final = 1 << 17
"""Longest text; it is cut into tokens where every other request waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasText:
    """The text of a request's canvas; at most one of them is set."""

    template: tuple[str | int, ...] = ()
    """The whole answer: fixed text, and the budgets of the holes in it."""
    suffix: str | None = None
    """What follows behind the answer."""
    draft: str | None = None
    """What the answer begins with, to be changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What the text of a request has to fit into."""

    width: int  # rows of the request's first canvas
    next_width: int  # rows of the canvases behind it
    left: int  # tokens of max_model_len behind the prompt
    max_tokens: int
    end: int | None  # id that ends an answer
    stops: Collection[int]  # all ids that do
    pad: int | None  # id that stands behind the end of an answer
    skips_special: bool  # whether special tokens are left out of the answer's text

    def named(self) -> str:
        """How wide the canvas is, for a message."""
        if self.width == self.next_width:
            return f"the canvas has {self.width}"
        return f"the first canvas, which ends with its block of {self.next_width}, has {self.width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A text as rows of ids."""

    seed_canvas: tuple[int, ...]  # from the first row of the answer on; -1 where a hole is
    pinned: tuple[int, ...] = ()
    holes: Holes | None = None


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of ids."""


def malformed_text(field: str, value: object) -> str | None:
    """What the value of one of ``TEXT_OPTIONS`` must be, if it is something else."""
    if field == "noise_level":
        share = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        return None if share else "a number above 0 and at most 1"
    if field != "template":
        return None if _is_text(value) and value else f"text of 1 to {MAX_CHARACTERS} characters"
    parts = value if isinstance(value, list | tuple) else ()
    if parts and all(_is_text(part) or (_is_count(part) and part > 0) for part in parts):
        return None
    return f"a list of texts (up to {MAX_CHARACTERS} characters) and positive integers (holes)"


def text_contradictions(
    sampling: Any,  # noqa: ANN401 - vLLM's SamplingParams by its attributes
    text: CanvasText,
    *,
    seed_canvas: Sequence[int],
    noise_level: float | None,
    read_only: bool,
) -> list[str]:
    """Wishes about the canvas that cannot all come true."""
    named = {name: bool(getattr(text, name)) for name in TEXTS} | {"seed_canvas": bool(seed_canvas)}
    given = [f"diffusion_{name}" for name, is_given in named.items() if is_given]
    problems = []
    if len(given) > 1:
        problems.append(f"{', '.join(given)} each say how the canvas begins: keep one")
    if noise_level is not None and not (text.draft or seed_canvas):
        problems.append("diffusion_noise_level needs a diffusion_draft or a diffusion_seed_canvas")
    if not (text.template or text.suffix):
        return problems
    never_ends = {
        "diffusion_read_only": read_only,
        "ignore_eos": sampling.ignore_eos,
        f"min_tokens={sampling.min_tokens}": sampling.min_tokens > 0,
    }
    if asked := [name for name, is_asked in never_ends.items() if is_asked]:
        problems.append(
            f"{given[0]} is one canvas and ends where its last hole is filled, which excludes "
            f"{', '.join(asked)}"
        )
    return problems


def rows_of(text: CanvasText, tokenizer: Tokenizer, frame: Frame) -> Rows:
    """The rows of a text.

    Raises:
        ParamsError: it does not fit, or the tokenizer cannot write it.
    """
    if frame.end is None:
        raise ParamsError("the tokenizer names no end of a text, which a text on a canvas needs")
    if text.template:
        return _template(text.template, tokenizer, frame, frame.end)
    if text.suffix is not None:
        return _suffix(_ids(tokenizer, text.suffix), frame, frame.end)
    draft = _ids(tokenizer, text.draft or "")
    return Rows(seed_canvas=_ended(draft, frame.end, frame.pad, frame.width, frame.next_width))


def _template(template: Sequence[str | int], tokenizer: Tokenizer, frame: Frame, end: int) -> Rows:
    parts = [(part, _ids(tokenizer, part)) for part in template if isinstance(part, str)]
    whole = "".join(part for part, _ in parts), [token for _, ids in parts for token in ids]
    problems = _unwritable([*parts, whole], tokenizer, frame)
    holes = sum(part for part in template if isinstance(part, int))
    need = holes + sum(len(ids) for _, ids in parts) + 1
    room = min(frame.width, frame.left)
    if need > room or need > frame.max_tokens:
        problems.append(
            f"diffusion_template needs {need} tokens ({need - 1 - holes} of text, {holes} of "
            f"holes, 1 for the end), but {frame.named()}, max_model_len leaves "
            f"{frame.left} behind the prompt, and max_tokens is {frame.max_tokens}; long text "
            "before the first hole belongs into the prompt"
        )
    if problems:
        raise ParamsError("; ".join(problems))
    rows: list[int] = []
    pieces = iter(parts)
    for part in template:
        rows += [-1] * part if isinstance(part, int) else next(pieces)[1]
    return _held(_ended(rows, end, frame.pad, room)[:room], need, frame.pad, -1)


def _unwritable(
    parts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer, frame: Frame
) -> list[str]:
    """Why fixed text would not come out as it went in."""
    problems = []
    for part, ids in parts:
        back = tokenizer.decode(ids, skip_special_tokens=frame.skips_special) if ids else ""
        if stops := sorted(set(ids) & {*frame.stops, frame.end}):
            problems.append(f"{reprlib.repr(part)} holds the ids {stops}, which end an answer")
        elif back != part:
            problems.append(
                f"the tokenizer writes {reprlib.repr(part)} as {reprlib.repr(back)}, so it cannot "
                "be given word for word"
            )
    return [f"diffusion_template: {problem}" for problem in dict.fromkeys(problems)]


def _suffix(suffix: list[int], frame: Frame, end: int) -> Rows:
    room, hole = min(frame.width, frame.left), frame.max_tokens
    if hole >= room:
        raise ParamsError(
            f"a suffix needs max_tokens below the canvas, whose rows hold the answer and what "
            f"follows it: max_tokens is {hole}, {frame.named()}, max_model_len leaves "
            f"{frame.left} behind the prompt"
        )
    rows = _ended([-1] * hole + suffix, end, frame.pad, room)[:room]
    return _held(rows, hole, frame.pad, end)


def _held(rows: tuple[int, ...], shown: int, pad: int | None, end: int) -> Rows:
    return Rows(
        seed_canvas=rows,
        pinned=tuple(at for at, token in enumerate(rows) if token >= 0),
        holes=Holes(shown=shown, pad=-1 if pad is None else pad, end=end),
    )


def _ended(
    rows: list[int], end: int, pad: int | None, width: int, next_width: int | None = None
) -> tuple[int, ...]:
    """The rows, their end, and what models are trained to write behind it.

    They fill canvases: one of ``width`` rows, then others of ``next_width``, or the same.
    """
    behind = (width - len(rows) - 1) % (next_width or width)
    return (*rows, end, *[end if pad is None else pad] * behind)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return False
    # Half a surrogate pair, which JSON can write and no tokenizer reads.
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: Any) -> bool:  # noqa: ANN401 - whatever a client sent
    return isinstance(value, int) and not isinstance(value, bool)
