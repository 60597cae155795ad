"""Compiled constraints of this process: each compiled once, kept while there is room.

Takes a constraint as vLLM names it and the ids that end a text. Gives its automaton, or the error
that says why there is none; either is remembered, since a request is checked where it enters and
compiled where it runs, and clients send the same schema again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from vllm.v1.structured_output.backend_types import StructuredOutputKey

KEPT_BYTES: Final = 256 << 20
"""Memory that the automata of a process may take together; the least recently used go first."""

KEPT_ERRORS: Final = 256
"""Constraints that did not compile, remembered beside them."""


@dataclass(slots=True)
class _Entry:
    """One constraint. Whoever holds the lock compiles; the others wait for it."""

    lock: Lock
    outcome: TokenAutomaton | ConstraintError | None = None


class Compiler:
    """Compiles for one vocabulary; may be called from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, *, any_whitespace: bool) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._any_whitespace = any_whitespace
        self._lock = Lock()
        self._entries: OrderedDict[tuple[StructuredOutputKey, frozenset[int]], _Entry]
        self._entries = OrderedDict()

    def compile(self, key: StructuredOutputKey, end_ids: frozenset[int]) -> TokenAutomaton:
        """The automaton of a constraint.

        Args:
            key: kind and text of the constraint, as vLLM takes them from a request.
            end_ids: tokens that end a complete text, and stand nowhere else in it.

        Raises:
            ConstraintError: malformed, not supported, too large, or nothing satisfies it.
        """
        with self._lock:
            entry = self._entries.setdefault((key, end_ids), _Entry(Lock()))
            self._entries.move_to_end((key, end_ids))
        with entry.lock:
            if entry.outcome is None:
                try:
                    entry.outcome = self._compiled(key, end_ids)
                except ConstraintError as error:
                    entry.outcome = error
                self._make_room()
        if isinstance(entry.outcome, ConstraintError):
            # A fresh one: an exception that is raised twice grows its traceback.
            raise type(entry.outcome)(str(entry.outcome))
        return entry.outcome

    def _compiled(self, key: StructuredOutputKey, end_ids: frozenset[int]) -> TokenAutomaton:
        kind, spec = key
        raise NotImplementedError(kind, spec, end_ids, self._tokenizer, self._vocab_size)

    def _make_room(self) -> None:
        with self._lock:
            outcomes = {name: entry.outcome for name, entry in self._entries.items()}
            errors = [name for name, each in outcomes.items() if isinstance(each, ConstraintError)]
            sizes = {
                name: each.nbytes
                for name, each in outcomes.items()
                if isinstance(each, TokenAutomaton)
            }
            gone = errors[:-KEPT_ERRORS]
            used = sum(sizes.values())
            for name in [*sizes][:-1]:
                if used > KEPT_BYTES:
                    used -= sizes[name]
                    gone.append(name)
            for name in gone:
                del self._entries[name]


@lru_cache(maxsize=2)
def compiler_of(tokenizer: Any, vocab_size: int, *, any_whitespace: bool) -> Compiler:
    """The compiler of an engine; one for its front end and its core where they share a process.

    Args:
        tokenizer: of the engine.
        vocab_size: ids that its model has.
        any_whitespace: JSON may be written with whitespace between its parts.
    """
    return Compiler(tokenizer, vocab_size, any_whitespace=any_whitespace)
