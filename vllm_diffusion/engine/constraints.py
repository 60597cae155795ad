"""Constraints where vLLM compiles them: in the engine's own thread pool, off the hot path.

    request -> checked where it enters       ``engine.constraint_check``
            -> compiled again, from a cache  ``ConstraintBackend``, asked by vLLM
            -> sent with the request         ``attach``, when the worker does not know it
            -> slots of the worker           ``attached``

vLLM's own net stays under it: every token that leaves is looked at once more on the host, and a
request whose tokens break its constraint ends with an error. What vLLM does for models that write
token by token, a mask for every position, is never asked for.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)

from vllm_diffusion.constrain.automaton.thinking import behind_thinking
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.engine.compiler import automaton_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

logger = logging.getLogger(f"vllm.{__name__}")

_CARRIER: Final = "vllm_diffusion_automaton"
"""Key in the ``extra_args`` that a worker sees; no client can send an object there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedAutomaton:
    """What a worker gets of a constraint."""

    name: str
    """Equal for equal automata."""
    automaton: TokenAutomaton


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How a request's thinking ends, before its constraint begins."""

    until: int
    """Id of the token that ends it."""
    forbidden: tuple[int, ...] = ()
    """Other ids by which vLLM would take it for ended."""


def attach(new: NewRequestData, named: NamedAutomaton) -> None:
    """Put an automaton beside the options of a request that goes to the worker.

    The scheduler's own copy of the options stays as it is: a request is sent again after
    preemption, and what its client may hold is not to be touched.
    """
    sampling = copy.copy(new.sampling_params)
    assert sampling is not None
    sampling.extra_args = {**(sampling.extra_args or {}), _CARRIER: named}
    new.sampling_params = sampling


def attached(new: NewRequestData) -> NamedAutomaton | None:
    """What ``attach`` put there."""
    sampling = new.sampling_params
    extra = sampling.extra_args if sampling is not None else None
    named = (extra or {}).get(_CARRIER)
    return named if isinstance(named, NamedAutomaton) else None


class ConstraintGrammar(StructuredOutputGrammar):
    """The constraint of one request on the host: what vLLM asks of a grammar, by an automaton.

    vLLM itself leaves out the tokens of a request's thinking, so there is no trace of it here.
    """

    def __init__(self, automaton: TokenAutomaton, end_ids: Iterable[int], *, name: str) -> None:
        self.automaton = automaton
        self._end_ids = tuple(sorted(end_ids))
        self._name = name
        self._walk = Walk(automaton)
        self._states = [automaton.start]
        self._sent: NamedAutomaton | None = None

    def for_worker(self, thinking: Thinking | None) -> NamedAutomaton:
        """What the worker gets, the same every time, see ``attach``.

        Args:
            thinking: of the request, read when it is first sent.
        """
        if self._sent is None:
            name, automaton = self._name, self.automaton
            if thinking is not None:
                forbidden = (*self._end_ids, *thinking.forbidden)
                automaton = behind_thinking(automaton, thinking.until, forbidden=forbidden)
                name = f"{name} behind {thinking}"
            self._sent = NamedAutomaton(name=name, automaton=automaton)
        return self._sent

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Walk on; False, and no move at all, if the constraint has no such text."""
        states = self._states[-1:]
        for token in tokens:
            state = self._walk.step(states[-1], token)
            if state == DEAD:
                logger.error(
                    "Request %s broke its constraint with token %d of %s.",
                    request_id,
                    token,
                    tokens,
                )
                return False
            states.append(state)
        self._states += states[1:]
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that the constraint excludes."""
        state = self._states[-1]
        for count, token in enumerate(tokens):
            if (state := self._walk.step(state, token)) == DEAD:
                return tokens[:count]
        return tokens

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        if num_tokens:
            del self._states[-num_tokens:]

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> NoReturn:
        """Never asked for: a canvas is not masked from left to right."""
        raise NotImplementedError

    def is_terminated(self) -> bool:
        """Whether the text is over, its end token included."""
        return self._states[-1] == self.automaton.end

    def reset(self) -> None:
        """Start over."""
        del self._states[1:]


@dataclass
class ConstraintBackend(StructuredOutputBackend):
    """What vLLM's StructuredOutputManager compiles with, for a diffusion model."""

    def compile_grammar(
        self,
        request_type: StructuredOutputOptions,
        grammar_spec: str,
        stop_token_ids: set[int] | None = None,
    ) -> ConstraintGrammar:
        """Compile; the request has been let in, so this finds what its check left in the cache.

        Raises:
            ConstraintError: only if the check was left out.
        """
        ends = frozenset(stop_token_ids or ())
        automaton = automaton_of(
            (request_type, grammar_spec),
            ends,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            config=self.vllm_config.structured_outputs_config,
        )
        text = f"{request_type.name} {sorted(ends)} {grammar_spec}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return ConstraintGrammar(automaton, ends, name=name)

    def allocate_token_bitmask(self, max_num_seqs: int) -> NoReturn:
        """Never asked for, see ``ConstraintGrammar.fill_bitmask``."""
        raise NotImplementedError

    def destroy(self) -> None:
        """Nothing is held."""
