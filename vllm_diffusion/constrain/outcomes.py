"""The outcome of compiling a constraint: an automaton, rules for a parser, or a refusal.

Outcomes travel from the process that compiles to the one that checks requests, and the first two
from there to the engine, so they hold bytes. ``outcome_of`` computes them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from vllm_diffusion.constrain.automaton.compile import compile_grammar
from vllm_diffusion.constrain.automaton.packed import packed
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.room import fitting, shortest
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from vllm_diffusion.constrain.automaton.classes import Limits
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.language.syntax import Grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSource:
    """A constraint as a request gives it."""

    kind: str
    """One of ``language.kinds.KINDS``."""
    text: str
    any_whitespace: bool = True
    """Between the parts of JSON values as pretty printers write; else none."""
    whitespace_pattern: str | None = None
    """A regular expression for that white space, instead."""
    tool_form: str | None = None
    """What makes the grammar of tool calls, as the served family declares it: "module:function"."""
    end_ids: tuple[int, ...]
    """Tokens that end a complete text, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptByAutomaton:
    """An automaton enforces the constraint."""

    data: bytes
    """See ``automaton.packed``."""
    tokens: int
    """Length of the shortest text, without its end token."""
    in_room: bool
    """Bounds that no text within the room can reach were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptByParser:
    """The constraint is too large for an automaton; a parser enforces it."""

    data: bytes
    """The rules, an ``xgrammar.Grammar`` in its serialised form."""
    length: int
    """Bytes of the shortest text; 0 where that is unknown."""
    in_room: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Nothing can enforce the constraint."""

    message: str


Outcome: TypeAlias = KeptByAutomaton | KeptByParser | Refused

MOST_RULE_BYTES = 16 << 20
"""Bytes of a grammar for a parser; every request with that constraint carries them."""

MOST_PARSER_BYTES = 512 << 20
"""Bytes of a compiled parser, in the engine and in each of its workers."""


def outcome_of(
    source: ConstraintSource,
    vocabulary: Vocabulary,
    *,
    room: int | None = None,
    limits: Limits | None = None,
) -> Outcome:
    """Compile a constraint.

    Args:
        source: the constraint.
        vocabulary: of the model's tokenizer.
        room: most bytes that a text can have, see ``language.room``; None: any number.
        limits: on the size of an automaton.
    """
    grammar, in_room = None, False
    try:
        try:
            whole = _read(source)
            grammar = fitting(whole, room)
            in_room = grammar != whole
            automaton = compile_grammar(
                grammar, vocabulary=vocabulary, end_ids=source.end_ids, limits=limits
            )
        except AutomatonError:
            return _by_parser(source, grammar, vocabulary, in_room=in_room)
        return KeptByAutomaton(
            data=packed(automaton),
            tokens=int(automaton.distance[automaton.start]),
            in_room=in_room,
        )
    except ConstraintError as error:
        return Refused(message=str(error))
    except RecursionError:
        return Refused(message="The constraint is nested too deep for a parser.")
    except MemoryError:
        return Refused(message="The constraint takes more memory to compile than it may.")


def _read(source: ConstraintSource) -> Grammar:
    return grammar_of(
        source.kind,
        source.text,
        any_whitespace=source.any_whitespace,
        whitespace_pattern=source.whitespace_pattern,
        tool_form=source.tool_form,
    )


def _by_parser(
    source: ConstraintSource, grammar: Grammar | None, vocabulary: Vocabulary, *, in_room: bool
) -> Outcome:
    """The rules for a parser, after compiling them once.

    Args:
        source: the constraint.
        grammar: the translated constraint; None for one that only the parser can read.
        vocabulary: as above.
        in_room: see ``KeptByParser``.

    Raises:
        ConstraintError: no parser can follow it.
    """
    # Takes seconds to import, and most constraints do not need it.
    from vllm_diffusion.constrain.grammar import compiler_of, rules_of

    rules = rules_of(source.kind, source.text, grammar=grammar)
    data = rules.serialize_json().encode()
    if len(data) > MOST_RULE_BYTES:
        raise ConstraintError(
            f"The constraint has {len(data)} bytes of rules, more than the {MOST_RULE_BYTES} that "
            "a parser is given. Name fewer values, or say them shorter."
        )
    needed = compiler_of(vocabulary, threads=1).compile_rules(rules).memory_size_bytes
    if needed > MOST_PARSER_BYTES:
        raise ConstraintError(
            f"A parser of the constraint needs {needed >> 20} MB, more than the "
            f"{MOST_PARSER_BYTES >> 20} that it may. Name fewer properties, or split it."
        )
    length = None if grammar is None else shortest(grammar)
    return KeptByParser(data=data, length=length or 0, in_room=in_room)


class OutcomeCache:
    """Outcomes by constraint; the least recently used are dropped when memory runs out.

    Refusals are cached as well: they may take as long to compute.

    Args:
        max_bytes: memory of outcomes and keys; an outcome that is larger alone is not cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Outcome] = OrderedDict()
        self._lock = Lock()
        self.nbytes = 0
        """Approximate memory of what is cached."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Outcome | None:
        """The outcome under a key, if it is cached."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, outcome: Outcome) -> None:
        """Cache an outcome, and drop others if need be."""
        with self._lock:
            if (old := self._kept.pop(key, None)) is not None:
                self.nbytes -= _bytes(old)
            self._kept[key] = outcome
            self.nbytes += _bytes(outcome)
            while self.nbytes > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self.nbytes -= _bytes(dropped)


_ENTRY_BYTES = 512
"""Bytes of a key, which is a digest, and of the objects around an outcome."""


def _bytes(outcome: Outcome) -> int:
    if isinstance(outcome, Refused):
        return _ENTRY_BYTES + 4 * len(outcome.message)
    return _ENTRY_BYTES + len(outcome.data)
