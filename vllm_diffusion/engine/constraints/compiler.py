"""A request's constraint, from where it is checked to where it is obeyed.

    request -> ConstraintSource   what it asks for                       ``source_of``
            -> Outcome            compiled by a process of its own       ``compiling``
            -> text               that vLLM sends to its engine          ``as_sent``
            -> Kept               what scheduler and worker follow       ``received``

The process that a client talks to compiles, so that what cannot be kept is an answer of status 400;
the engine gets what came of it in the place of the constraint, and compiles nothing. The vocabulary
is taken apart once a tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakValueDictionary

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_json_nesting
from vllm.v1.structured_output.request import get_structured_output_key

from vllm_diffusion.constrain.automaton.packed import unpacked
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.vocabulary import vocabulary_of
from vllm_diffusion.constrain.compile_pool import CompilePool
from vllm_diffusion.constrain.outcomes import ConstraintSource, KeptByAutomaton, KeptByParser
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from concurrent.futures import Future

    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import StructuredOutputsParams
    from xgrammar import CompiledGrammar

    from vllm_diffusion.constrain.automaton.thinking import Thinking
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.grammar import GrammarCompiler
    from vllm_diffusion.constrain.guard import Guard
    from vllm_diffusion.constrain.outcomes import Outcome


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class ParsedConstraint:
    """A constraint that a parser follows, see ``constrain.guard``."""

    rules: str
    """An ``xgrammar.Grammar`` in its serialised form."""
    end_ids: tuple[int, ...]

    def compiled(self, parsers: GrammarCompiler) -> CompiledGrammar:
        """For a parser of its own for every request.

        Raises:
            ConstraintError: no parser can follow it.
        """
        import xgrammar

        return parsers.compile_rules(xgrammar.Grammar.deserialize_json(self.rules))


Kept: TypeAlias = TokenAutomaton | ParsedConstraint
"""What a constraint is kept by."""

_SENT: Final = "vllm-diffusion"
"""What a compiled constraint begins with where vLLM sends it."""

_received: WeakValueDictionary[str, Kept] = WeakValueDictionary()
"""Those that some request obeys: equal ones are kept once."""


def as_text(asked: StructuredOutputsParams) -> StructuredOutputsParams:
    """The same constraint, a JSON schema as text: that is looked at, copied and sent many times.

    Raises:
        VLLMValidationError: it is nested too deep, or asks for nothing.
    """
    check_json_nesting(asked.json)
    check_json_nesting(asked.structural_tag, structural_tag=True)
    if asked.json_object is False:
        raise VLLMValidationError("structured_outputs.json_object is true or left out, not false")
    if asked.json is None or isinstance(asked.json, str):
        return asked
    return replace(asked, json=json.dumps(asked.json))


def source_of(
    asked: StructuredOutputsParams,
    end_ids: Collection[int],
    config: StructuredOutputsConfig,
    *,
    tool_form: str | None = None,
) -> ConstraintSource:
    """What a request asks for.

    Args:
        asked: its constraint.
        end_ids: tokens that end a complete text, and stand nowhere else in it.
        config: how the engine was asked to read constraints.
        tool_form: what makes the grammar of tool calls, see ``Family.tools``.
    """
    kind, text = get_structured_output_key(asked)
    return ConstraintSource(
        kind=kind.name.lower(),
        text=text,
        any_whitespace=not (config.disable_any_whitespace or asked.disable_any_whitespace),
        whitespace_pattern=asked.whitespace_pattern,
        tool_form=tool_form,
        end_ids=tuple(sorted(end_ids)),
    )


def compiling(
    source: ConstraintSource,
    *,
    tokenizer: Any,
    vocab_size: int,
    limit: int,
    banned: tuple[int, ...] = (),
) -> Future[Outcome]:
    """What becomes of a constraint, in time. From any thread.

    Args:
        source: the constraint.
        tokenizer: of the engine.
        vocab_size: ids that its model has.
        limit: tokens that the request may write.
        banned: ids that no text of the model may hold.
    """
    vocabulary = vocabulary_for(tokenizer, vocab_size, banned)
    # In steps of two: requests with about as much room share what was compiled.
    room = 1 << max(limit * vocabulary.longest - 1, 0).bit_length()
    return _pool(os.getpid()).submit(source, vocabulary, room=room)


def as_sent(outcome: KeptByAutomaton | KeptByParser, end_ids: Sequence[int]) -> str:
    """A compiled constraint as text, which is what vLLM sends to its engine.

    Args:
        outcome: what came of it.
        end_ids: its own.
    """
    kind = "automaton" if isinstance(outcome, KeptByAutomaton) else "rules"
    ends = ",".join(map(str, end_ids))
    return f"{_SENT} {kind} {ends} {base64.b64encode(outcome.data).decode()}"


def received(text: str) -> tuple[Kept, tuple[int, ...], str]:
    """What was sent, its end tokens, and a name that is equal for equal constraints.

    Raises:
        ConstraintError: no compiled constraint was.
    """
    sender, _, rest = text.partition(" ")
    if sender != _SENT:
        raise ConstraintError("A constraint came to the engine that nobody has checked.")
    kind, ends, data = rest.split(" ")
    end_ids = tuple(map(int, filter(None, ends.split(","))))
    name = hashlib.sha256(text.encode()).hexdigest()
    kept = _received.get(name)
    if kept is None:
        read = base64.b64decode(data)
        kept = (
            unpacked(read)
            if kind == "automaton"
            else ParsedConstraint(rules=read.decode(), end_ids=end_ids)
        )
        _received[name] = kept
    return kept, end_ids, name


def guard_of(
    parsed: ParsedConstraint,
    parsers: GrammarCompiler,
    *,
    tokens_left: int | None = None,
    written: Sequence[int] = (),
    thinking: Thinking | None = None,
) -> Guard:
    """The parser of one request.

    Args:
        parsed: its constraint.
        parsers: of the vocabulary; it keeps what it has compiled.
        tokens_left: that the request may write yet; None for any number.
        written: the tokens it has written, where it comes back.
        thinking: that comes before the constraint.
    """
    return parsers.guard(
        parsed.compiled(parsers),
        end_tokens=parsed.end_ids,
        tokens_left=tokens_left,
        written=written,
        thinking=thinking,
    )


def parsers_of(tokenizer: Any, vocab_size: int) -> GrammarCompiler:
    """What compiles the constraints that parsers follow."""
    # Seconds to import, and most engines never need it.
    from vllm_diffusion.constrain.grammar import compiler_of

    return compiler_of(vocabulary_for(tokenizer, vocab_size))


@lru_cache(maxsize=2)
def vocabulary_for(tokenizer: Any, vocab_size: int, banned: tuple[int, ...] = ()) -> Vocabulary:
    """What the tokens of a tokenizer write, taken apart once; banned ones write nothing."""
    return vocabulary_of(tokenizer, vocab_size).without(banned)


@lru_cache(maxsize=1)
def _pool(process: int) -> CompilePool:
    """The pool of a process; one that was forked has none of its parent's threads."""
    del process
    return CompilePool()
