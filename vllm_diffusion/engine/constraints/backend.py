"""Constraints where vLLM asks for them: in the engine's own thread pool, off the hot path.

    request -> compiled where it enters  ``engine.admission``
            -> received as such          ``ConstraintBackend``, asked by vLLM
            -> sent with the request     a ``NamedConstraint``, when the worker does not know it

vLLM's own net stays under it: every token that leaves is looked at once more on the host, and a
request whose tokens break its constraint ends with an error. What vLLM does for models that write
token by token, a mask for every position, is never asked for.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)

from vllm_diffusion.constrain.automaton.allowed import restricted
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.thinking import behind_thinking
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.engine.constraints.compiler import guard_of, parsers_of, received

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    from vllm_diffusion.constrain.automaton.thinking import Thinking
    from vllm_diffusion.constrain.guard import Guard
    from vllm_diffusion.engine.constraints.compiler import Kept, ParsedConstraint

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedConstraint:
    """What a worker gets of a constraint."""

    name: str
    """Equal for equal constraints."""
    kept: Kept
    thinking: Thinking | None = None
    """What comes before it, where ``kept`` does not say so."""


class ConstraintGrammar(StructuredOutputGrammar):
    """The constraint of one request on the host: what vLLM asks of a grammar.

    vLLM itself leaves out the tokens of a request's thinking, so there is no trace of it here.
    """

    @abstractmethod
    def for_worker(
        self, thinking: Thinking | None, allowed: Collection[int] | None
    ) -> NamedConstraint:
        """What the worker gets.

        Args:
            thinking: of the request, before its first token.
            allowed: the only tokens that the request may write; None: all.
        """

    def validate_tokens(self, tokens: list[int]) -> NoReturn:
        """Never asked for: no draft is cut."""
        raise NotImplementedError

    def rollback(self, num_tokens: int) -> NoReturn:
        """Never asked for: nothing is accepted that does not stay."""
        raise NotImplementedError

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> NoReturn:
        """Never asked for: a canvas is not masked from left to right."""
        raise NotImplementedError

    def reset(self) -> NoReturn:
        """Never asked for."""
        raise NotImplementedError


class AutomatonGrammar(ConstraintGrammar):
    """One that an automaton keeps."""

    def __init__(self, automaton: TokenAutomaton, end_ids: Iterable[int], *, name: str) -> None:
        self.automaton = automaton
        self._end_ids = tuple(sorted(end_ids))
        self._name = name
        self._walk = Walk(automaton)
        self._state = automaton.start
        self._sent: NamedConstraint | None = None

    def for_worker(
        self, thinking: Thinking | None, allowed: Collection[int] | None
    ) -> NamedConstraint:
        """See ``ConstraintGrammar``; the same every time."""
        if self._sent is None:
            name, automaton = self._name, self.automaton
            if allowed is not None:
                automaton = restricted(automaton, allowed)
                name = f"{name} of {sorted(allowed)}"
            if thinking is not None:
                automaton = behind_thinking(automaton, thinking, end_ids=self._end_ids)
                name = f"{name} behind {thinking.begin} to {thinking.until}"
            self._sent = NamedConstraint(name=name, kept=automaton)
        return self._sent

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Walk on; False, and no move at all, if the constraint has no such text."""
        state = self._walk.through(self._state, tokens)
        if state == DEAD:
            _broken(request_id, tokens)
            return False
        self._state = state
        return True

    def is_terminated(self) -> bool:
        """Whether the text is over, its end token included."""
        return self._state == self.automaton.end


class ParserGrammar(ConstraintGrammar):
    """One that a parser keeps."""

    def __init__(self, parsed: ParsedConstraint, guard: Guard, *, name: str) -> None:
        self._parsed, self._name = parsed, name
        self._guard = guard
        self._sent: NamedConstraint | None = None

    def for_worker(
        self, thinking: Thinking | None, allowed: Collection[int] | None
    ) -> NamedConstraint:
        """See ``ConstraintGrammar``; tokens that are not allowed are the worker's own business."""
        del allowed
        if self._sent is None:
            self._sent = NamedConstraint(name=self._name, kept=self._parsed, thinking=thinking)
        return self._sent

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Read on; False if the grammar has no such text."""
        try:
            self._guard.write(tokens)
        except ValueError:
            _broken(request_id, tokens)
            return False
        return True

    def is_terminated(self) -> bool:
        """Whether the text is over, its end token included."""
        return self._guard.is_over()


def _broken(request_id: str, tokens: list[int]) -> None:
    logger.error("Request %s broke its constraint with some of the tokens %s.", request_id, tokens)


@dataclass
class ConstraintBackend(StructuredOutputBackend):
    """What vLLM's StructuredOutputManager compiles with, for a diffusion model."""

    def compile_grammar(
        self,
        request_type: StructuredOutputOptions,
        grammar_spec: str,
        stop_token_ids: set[int] | None = None,
    ) -> ConstraintGrammar:
        """Take what was compiled where the request entered.

        Raises:
            ConstraintError: only if its check was left out.
        """
        del request_type, stop_token_ids
        kept, end_ids, name = received(grammar_spec)
        if isinstance(kept, TokenAutomaton):
            return AutomatonGrammar(kept, end_ids, name=name)
        guard = guard_of(kept, parsers_of(self.tokenizer, self.vocab_size))
        return ParserGrammar(kept, guard, name=name)

    def allocate_token_bitmask(self, max_num_seqs: int) -> NoReturn:
        """Never asked for, see ``ConstraintGrammar.fill_bitmask``."""
        raise NotImplementedError

    def destroy(self) -> None:
        """Nothing is held."""
