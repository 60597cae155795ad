"""A constraint -> token automaton."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.automaton.classes import Limits, token_automaton
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.room import fitting
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_diffusion.constrain.automaton.dfa import Dfa
    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.language.syntax import Grammar

logger = logging.getLogger(__name__)


def compile_constraint(
    kind: str,
    text: str,
    *,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    any_whitespace: bool = True,
    whitespace_pattern: str | None = None,
    tool_form: str | None = None,
    room: int | None = None,
    limits: Limits | None = None,
) -> TokenAutomaton:
    """Compile a constraint to an automaton over classes of tokens.

    Args:
        kind: one of ``language.kinds.KINDS``.
        text: the JSON schema, the regular expression, the JSON list of choices, the EBNF grammar,
            the structural tag; nothing for ``json_object``.
        vocabulary: of the model's tokenizer.
        end_ids: the tokens that end an output; at least one.
        any_whitespace: between the parts of JSON values as pretty printers write; else none.
        whitespace_pattern: a regular expression for that white space, instead.
        tool_form: for structural tags of tool calls, see ``language.tags``.
        room: most bytes that a text can have. Bounds beyond it are dropped, so the automaton
            also accepts longer texts that violate the constraint. None: any number.
        limits: on the size of the automaton.

    Raises:
        ConstraintError: it is malformed, not supported, or nothing satisfies it.
        AutomatonError: it is valid, but too large for an automaton.
    """
    grammar = grammar_of(
        kind,
        text,
        any_whitespace=any_whitespace,
        whitespace_pattern=whitespace_pattern,
        tool_form=tool_form,
    )
    return compile_grammar(
        fitting(grammar, room), vocabulary=vocabulary, end_ids=end_ids, limits=limits
    )


def compile_grammar(
    grammar: Grammar,
    *,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    limits: Limits | None = None,
) -> TokenAutomaton:
    """The same for a constraint that is already a grammar.

    Raises:
        ConstraintError: nothing satisfies it.
        AutomatonError: it is too large for an automaton, or nested too deep to make one.
    """
    limits = limits or Limits()
    over_tokens = partial(token_automaton, vocabulary=vocabulary, end_ids=end_ids, limits=limits)
    try:
        return _deepest(Networks(grammar, max_states=limits.states), over_tokens, limits)
    except RecursionError:
        raise AutomatonError("The constraint is nested too deep for an automaton.") from None


def _deepest(
    networks: Networks, over_tokens: Callable[[Dfa], TokenAutomaton], limits: Limits
) -> TokenAutomaton:
    """The automaton that nests deepest within the limits. The size doubles with every level."""
    if not networks.recursive:
        return over_tokens(networks.automaton(0))
    best: TokenAutomaton | None = None
    problem: ConstraintError | None = None
    for depth in range(limits.depth + 1):
        try:
            found = replace(over_tokens(networks.automaton(depth)), depth=depth)
            if best is not None and (
                found.num_states > limits.deep_states or len(found.source) > limits.deep_edges
            ):
                break
            best = found
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
