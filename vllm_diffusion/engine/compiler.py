"""How an engine keeps its constraints, for the process that checks and the one that runs.

Takes a constraint as vLLM names it and the ids that end a text. Gives its automaton, or, where that
would be too large, what a parser needs to follow it. The vocabulary is taken apart once a
tokenizer; what was compiled is kept by ``compile_constraint`` and ``GrammarCompiler``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.vocabulary import vocabulary_of
from vllm_diffusion.errors import AutomatonError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vllm.config import StructuredOutputsConfig
    from vllm.v1.structured_output.backend_types import StructuredOutputKey
    from xgrammar import CompiledGrammar

    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.grammar import GrammarCompiler
    from vllm_diffusion.constrain.guard import Guard


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedConstraint:
    """A constraint that a parser follows, see ``constrain.guard``."""

    kind: str
    text: str
    any_whitespace: bool
    end_ids: tuple[int, ...]

    def compiled(self, parsers: GrammarCompiler) -> CompiledGrammar:
        """For a parser of its own for every request.

        Raises:
            ConstraintError: no parser can follow it.
        """
        return parsers.compile(self.kind, self.text, any_whitespace=self.any_whitespace)


Kept: TypeAlias = TokenAutomaton | ParsedConstraint
"""What a constraint is kept by."""


def kept_by(
    key: StructuredOutputKey,
    end_ids: Collection[int],
    *,
    tokenizer: Any,
    vocab_size: int,
    config: StructuredOutputsConfig,
) -> Kept:
    """What keeps a constraint, from any thread.

    Args:
        key: kind and text of the constraint, as vLLM takes them from a request.
        end_ids: tokens that end a complete text, and stand nowhere else in it.
        tokenizer: of the engine.
        vocab_size: ids that its model has.
        config: how the engine was asked to read constraints.

    Raises:
        ConstraintError: malformed, not supported, or nothing satisfies it.
    """
    kind, text = key
    any_whitespace = not config.disable_any_whitespace
    ends = tuple(sorted(end_ids))
    try:
        automaton = compile_constraint(
            kind.name.lower(),
            text,
            vocabulary=_vocabulary(tokenizer, vocab_size),
            end_ids=ends,
            any_whitespace=any_whitespace,
        )
    except AutomatonError:
        parsed = ParsedConstraint(
            kind=kind.name.lower(), text=text, any_whitespace=any_whitespace, end_ids=ends
        )
        parsed.compiled(parsers_of(tokenizer, vocab_size))
        return parsed
    return automaton


def guard_of(
    parsed: ParsedConstraint,
    parsers: GrammarCompiler,
    *,
    tokens_left: int | None = None,
    written: Sequence[int] = (),
) -> Guard:
    """The parser of one request.

    Args:
        parsed: its constraint.
        parsers: of the vocabulary; it has compiled the constraint before, and kept it.
        tokens_left: that the request may write yet; None for any number.
        written: the tokens it has written, where it comes back.
    """
    return parsers.guard(
        parsed.compiled(parsers),
        end_tokens=parsed.end_ids,
        tokens_left=tokens_left,
        written=written,
    )


@lru_cache(maxsize=2)
def parsers_of(tokenizer: Any, vocab_size: int) -> GrammarCompiler:
    """What compiles the constraints that parsers follow."""
    # Seconds to import, and most engines never need it.
    from vllm_diffusion.constrain.grammar import GrammarCompiler

    vocabulary = _vocabulary(tokenizer, vocab_size)
    return GrammarCompiler([vocabulary.text(token) for token in range(len(vocabulary))])


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    return vocabulary_of(tokenizer, vocab_size)
