"""A request's constraint -> token automaton; compiled once, kept as long as there is room."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from vllm_diffusion.constrain.automaton.classes import Limits, token_automaton
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.room import shortest, within
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from vllm_diffusion.constrain.automaton.dfa import Dfa
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.language.syntax import Grammar

logger = logging.getLogger(__name__)


Outcome: TypeAlias = TokenAutomaton | ConstraintError

_ERROR_BYTES = 4096  # about, with the constraint itself


class AutomatonCache:
    """What became of constraints, the least recently used dropped when there is no more room.

    That one has no automaton is kept as well: it may have taken as long to find out.

    Args:
        max_bytes: of the automata kept; one that is larger by itself is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Outcome] = OrderedDict()
        self._lock = Lock()  # constraints are compiled in threads

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(
            outcome.nbytes if isinstance(outcome, TokenAutomaton) else _ERROR_BYTES
            for outcome in self._kept.values()
        )

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Outcome | None:
        """What was kept under a key."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, outcome: Outcome) -> None:
        """Keep what became of a constraint, and drop others if need be."""
        with self._lock:
            self._kept[key] = outcome
            while self.nbytes > self._max_bytes:
                self._kept.popitem(last=False)


_CACHE = AutomatonCache(256 << 20)


def compile_constraint(
    kind: str,
    text: str,
    *,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    any_whitespace: bool = True,
    whitespace_pattern: str | None = None,
    room: int | None = None,
    limits: Limits | None = None,
    cache: AutomatonCache = _CACHE,
) -> TokenAutomaton:
    """What a request's output must be, as an automaton over classes of tokens.

    Args:
        kind: one of ``language.kinds.KINDS``.
        text: the JSON schema, the regular expression, the JSON list of choices, the EBNF grammar,
            the structural tag; nothing for ``json_object``.
        vocabulary: of the model's tokenizer.
        end_ids: the tokens that end an output; at least one.
        any_whitespace: between the parts of JSON values as pretty printers write; else none.
        whitespace_pattern: a regular expression for that white space, instead.
        room: bytes that a text can have at most; bounds beyond it are taken for none, so that the
            automaton accepts longer texts that are not the constraint's. None: any number.
        limits: on the size of the automaton.
        cache: where compiled constraints are kept.

    Raises:
        ConstraintError: it is malformed, not supported, or nothing satisfies it.
        AutomatonError: it makes sense, but is too large for an automaton.
    """
    limits = limits or Limits()
    spacing = any_whitespace, whitespace_pattern
    key = kind, text, vocabulary.fingerprint, tuple(end_ids), *spacing, room, limits
    over_tokens = partial(
        token_automaton,
        vocabulary=vocabulary,
        end_ids=end_ids,
        limits=limits,
    )
    outcome = cache.get(key)
    if outcome is None:
        try:
            grammar = grammar_of(
                kind, text, any_whitespace=any_whitespace, whitespace_pattern=whitespace_pattern
            )
            if room is not None:
                _require_room(grammar, room)
                grammar = within(grammar, room)
            networks = Networks(grammar, max_states=limits.states)
            outcome = _deepest(networks, over_tokens, limits.depth)
        except RecursionError:
            outcome = AutomatonError("The constraint is nested too deep.")
        except ConstraintError as error:
            outcome = error.with_traceback(None)
        cache.put(key, outcome)
    if isinstance(outcome, ConstraintError):
        # A new one every time: an exception that is raised again grows its traceback.
        raise type(outcome)(str(outcome))
    return outcome


def _require_room(grammar: Grammar, room: int) -> None:
    least = shortest(grammar)
    if least is not None and least > room:
        raise ConstraintError(
            f"the shortest text of the constraint has {least} bytes, more than the tokens that "
            "max_tokens and max_model_len leave can write"
        )


def _deepest(
    networks: Networks, over_tokens: Callable[[Dfa], TokenAutomaton], most: int
) -> TokenAutomaton:
    """The automaton that nests deepest within the limits. The size doubles with every level."""
    if not networks.recursive:
        return over_tokens(networks.automaton(0))
    best: TokenAutomaton | None = None
    problem: ConstraintError | None = None
    for depth in range(most + 1):
        try:
            best = replace(over_tokens(networks.automaton(depth)), depth=depth)
        except AutomatonError as error:
            problem = error
            break
        except ConstraintError as error:  # nothing is as shallow as that
            problem = error
    if best is None:
        assert problem is not None
        raise problem
    logger.info("A recursive constraint is followed to nesting depth %d.", best.depth)
    return best
