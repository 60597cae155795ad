"""Structural tags -> grammar: text of which parts, between tags, follow constraints of their own.

xgrammar's format, as vLLM takes it, and the older one of ``structures`` and ``triggers``. xgrammar
checks it; schemas and expressions inside are translated as they are elsewhere, so they are sound.
Formats that speak of tokens by id are not supported: special tokens write no text here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.calls import MARK_OF_CALLS, AskedCalls, maker_of
from vllm_diffusion.constrain.language.ebnf import ebnf
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.schema import json_schema
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    Call,
    Chars,
    Choice,
    Grammar,
    Node,
    Repeat,
    complement,
    optional,
    renamed,
    sequence,
    text,
)
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


def structural_tag(
    tag: str,
    json_of: Callable[[str], Grammar] = json_schema,
    *,
    tool_form: str | None = None,
) -> Grammar:
    """The grammar of a structural tag.

    Args:
        tag: its JSON text.
        json_of: what reads the JSON schemas between tags.
        tool_form: what makes the grammar of tool calls, see ``calls.maker_of``; None: such a tag is
            malformed. Never of the request: what it names is imported.

    Raises:
        ConstraintError: it is malformed.
        AutomatonError: it has a format that is not supported.
    """
    import xgrammar

    try:
        parsed = json.loads(tag)
        if "structures" in parsed:
            return _Tags(json_of).grammar(_of_old(parsed))
        asked = str(parsed["format"].get("grammar", ""))
        if tool_form is not None and asked.startswith(MARK_OF_CALLS):
            return maker_of(tool_form)(AskedCalls.of_text(asked))
        xgrammar.Grammar.from_structural_tag(tag)
    except (RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConstraintError(f"This is not a structural tag: {error}") from error
    return _Tags(json_of).grammar(parsed["format"])


def _of_old(parsed: dict[str, Any]) -> dict[str, Any]:
    """What the older form means in the newer one."""
    tags = [
        {
            "begin": item["begin"],
            "content": {"type": "json_schema", "json_schema": item["schema"]},
            "end": item["end"],
        }
        for item in parsed["structures"]
    ]
    return {"type": "triggered_tags", "triggers": parsed["triggers"], "tags": tags}


class _Tags:
    """Formats, one method a kind; what must be a rule becomes one."""

    def __init__(self, json_of: Callable[[str], Grammar]) -> None:
        self._json_of = json_of
        self._rules: dict[str, Node] = {}

    def grammar(self, form: dict[str, Any]) -> Grammar:
        """The grammar of a whole text in one format."""
        root = self._node(form)
        return Grammar({**self._rules, "tags": root}, "tags")

    def _node(self, form: dict[str, Any], ends: Iterable[str] = ()) -> Node:
        """What a format reads; free text in it stops before any of ``ends``."""
        if form.get("max_tokens") is not None or form.get("max_chars") is not None:
            raise AutomatonError(
                "A structural tag that counts tokens or characters is not supported."
            )
        match form["type"]:
            case "const_string":
                return text(form["value"])
            case "json_schema" if form.get("style", "json") == "json" and not form.get("any_order"):
                return self._embedded(self._json_of(json.dumps(form["json_schema"])))
            case "regex":
                return regex(form["pattern"])
            case "grammar":
                return self._embedded(ebnf(form["grammar"]))
            case "any_text":
                return self._text(dict.fromkeys((*form.get("excludes", ()), *ends)))
        return self._composed(form, ends)

    def _composed(self, form: dict[str, Any], ends: Iterable[str]) -> Node:
        """What a format made of others reads."""
        match form["type"]:
            case "sequence":
                *others, last = form["elements"] or [{"type": "const_string", "value": ""}]
                return sequence(*map(self._node, others), self._node(last, ends))
            case "or":
                return Choice(tuple(self._node(each, ends) for each in form["elements"]))
            case "tag":
                return sequence(text(_string(form["begin"])), self._behind(form))
            case "triggered_tags":
                return self._triggered(form, ends)
            case "tags_with_separator":
                return self._separated(form)
            case "optional":
                return optional(self._node(form["content"], ends))
            case "star" | "plus":
                return Repeat(self._node(form["content"]), int(form["type"] == "plus"))
            case "repeat":
                most = None if form["max"] < 0 else form["max"]
                return Repeat(self._node(form["content"]), form["min"], most)
        raise AutomatonError(f"The structural format {form['type']!r} is not supported here.")

    def _behind(self, tag: dict[str, Any], skip: int | None = None) -> Node:
        """Content and end of a tag; with ``skip`` what is left of its beginning, too."""
        ends = [tag["end"]] if isinstance(tag["end"], str) else tag["end"]
        ends = [_string(end) for end in ends]
        begin = [] if skip is None else [text(_string(tag["begin"])[skip:])]
        content = self._node(tag["content"], [end for end in ends if end])
        return sequence(*begin, content, Choice(tuple(map(text, ends))))

    def _separated(self, form: dict[str, Any]) -> Node:
        one = Choice(tuple(self._node({**tag, "type": "tag"}) for tag in form["tags"]))
        more = (
            [] if form.get("stop_after_first") else [Repeat(sequence(text(form["separator"]), one))]
        )
        some = sequence(one, *more)
        return some if form.get("at_least_one") else optional(some)

    def _triggered(self, form: dict[str, Any], ends: Iterable[str]) -> Node:
        """Free text; where a trigger is complete, a tag that begins with it must go on."""
        once, needed = form.get("stop_after_first"), form.get("at_least_one")
        first = Choice(tuple(self._node({**tag, "type": "tag"}) for tag in form["tags"]))
        if once and needed:
            return first
        stops: dict[str, Node | None] = dict.fromkeys((*form.get("excludes", ()), *ends))
        for trigger in form["triggers"]:
            tags = [tag for tag in form["tags"] if _string(tag["begin"]).startswith(trigger)]
            stops[trigger] = self._rule(
                Choice(tuple(self._behind(tag, skip=len(trigger)) for tag in tags))
            )
        free = self._text(stops, again=not once)
        return sequence(first, free) if needed else free

    def _text(self, stops: Mapping[str, Node | None], *, again: bool = False) -> Node:
        """Text up to the first of some strings, and what follows that; None: it must not come.

        The automaton of Aho and Corasick (1975), a rule a state: the longest end of what was read
        that could become one of the strings.
        """
        number = len(self._rules)
        heads = {stop[:length] for stop in stops for length in range(len(stop))} | {""}
        letters = sorted(set("".join(stops)))

        def state(read: str) -> Call:
            ends = (read[start:] for start in range(len(read) + 1))
            return Call(f"text {number}, {next(end for end in ends if end in heads)!r}")

        self._rules[state("").rule] = EMPTY  # takes the number
        others = Chars(complement((ord(letter), ord(letter)) for letter in letters))
        for head in heads:
            options: list[Node] = [EMPTY, sequence(others, state(""))]
            for letter in letters:
                stop = next((each for each in stops if (head + letter).endswith(each)), None)
                if stop is None:
                    options.append(sequence(text(letter), state(head + letter)))
                elif (inner := stops[stop]) is not None:
                    more = [state("")] if again else []
                    options.append(sequence(text(letter), inner, *more))
            self._rules[state(head).rule] = Choice(tuple(options))
        return state("")

    def _embedded(self, grammar: Grammar) -> Node:
        """A call of another grammar's root, its rules added under names of their own."""
        inner = renamed(grammar, f"{len(self._rules)}: ")
        self._rules.update(inner.rules)
        return Call(inner.root)

    def _rule(self, node: Node) -> Call:
        name = f"tag {len(self._rules)}"
        self._rules[name] = node
        return Call(name)


def _string(mark: Any) -> str:
    if not isinstance(mark, str):
        raise AutomatonError("A structural tag that begins or ends with a token is not supported.")
    return mark
