"""Items of a user's task, from a file of JSON lines, and the verifiers that score answers.

    {"prompt": "What is 2 + 2?", "answer": "4"}
    {"prompt": [{"role": "user", "content": "..."}], "answer": {"name": "Ann"}, "max_tokens": 300}

A prompt is a text, sent as one user turn, or a conversation. ``answer`` is what the verifier
compares with, ``max_tokens`` the item's own limit.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from vllm_diffusion.errors import TuneError

if TYPE_CHECKING:
    from collections.abc import Callable

    Verifier: TypeAlias = Callable[[str, "TaskItem"], float]
    """Answer and item -> score from 0 (wrong) to 1 (right)."""

_KEYS: Final = ("prompt", "answer", "max_tokens")
_SHOWN: Final = 10  # most problems of a file that the message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskItem:
    """One question."""

    messages: list[dict[str, Any]]
    answer: Any = None
    max_tokens: int | None = None


def load_items(path: str | Path) -> list[TaskItem]:
    """Read a file of JSON lines; blank lines are ignored.

    Raises:
        TuneError: the file cannot be read, is empty, or has invalid lines, which the message names.
    """
    try:
        # Not splitlines: JSON strings may contain U+2028 and the like unescaped.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TuneError(f"{path} cannot be read: {error}") from error
    items, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(line))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TuneError(f"{path} is not a task: {'; '.join(problems[:_SHOWN])}{more}.")
    if not items:
        raise TuneError(
            f'{path} holds no items; write a JSON object per line: {{"prompt": ..., "answer": ...}}'
        )
    return items


def load_verifier(name: str) -> Verifier:
    """The verifier of a name: one of ``VERIFIERS``, or ``FILE.py:FUNCTION``.

    A function in a file takes the text of an answer and the ``TaskItem``, and returns a boolean or
    a number from 0 to 1.

    Raises:
        TuneError: no such verifier, or its file cannot be run.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    file, _, function = name.rpartition(":")
    if not file:
        raise TuneError(
            f"there is no verifier {name!r}; accepted: {', '.join(VERIFIERS)}, or FILE.py:FUNCTION"
        )
    spec = importlib.util.spec_from_file_location("verifier", file)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is not a Python file")  # noqa: TRY301 - one message for all
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        verifier = vars(module)[function]
    except KeyError:
        raise TuneError(f"{file} has no {function!r}") from None
    except Exception as error:
        raise TuneError(f"the verifier {file} cannot be run: {error!r}") from error
    return _checked(verifier, name)


def exact(text: str, item: TaskItem) -> float:
    """Whether the answer equals the item's, ignoring surrounding white space."""
    return float(text.strip() == str(item.answer).strip())


def contains(text: str, item: TaskItem) -> float:
    """Whether the text contains the item's answer."""
    return float(str(item.answer) in text)


def same_json(text: str, item: TaskItem) -> float:
    """Whether the text is JSON equal to the item's answer, which may be a value or JSON text."""
    try:
        wanted = json.loads(item.answer) if isinstance(item.answer, str) else item.answer
        return float(json.loads(text) == wanted)
    except ValueError:
        return 0.0


VERIFIERS: Final[dict[str, Verifier]] = {"exact": exact, "contains": contains, "json": same_json}


def _checked(verifier: Any, name: str) -> Verifier:  # noqa: ANN401 - from a user's file
    if not callable(verifier):
        raise TuneError(f"{name} is not a function")

    def score(text: str, item: TaskItem) -> float:
        try:
            value = float(verifier(text, item))
        except Exception as error:
            raise TuneError(f"the verifier {name} failed on {text!r}: {error!r}") from error
        if not 0 <= value <= 1:
            raise TuneError(f"the verifier {name} returned {value}, not a number from 0 to 1")
        return value

    return score


def _item(line: str) -> TaskItem:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind for all that a line may be
    if unknown := values.keys() - set(_KEYS):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; accepted: {', '.join(_KEYS)}")
    prompt, limit = values.get("prompt"), values.get("max_tokens")
    if isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    elif not (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
    ):
        raise ValueError("prompt must be a text or a list of messages")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"max_tokens must be a positive integer, got {limit!r}")
    return TaskItem(messages=prompt, answer=values.get("answer"), max_tokens=limit)
