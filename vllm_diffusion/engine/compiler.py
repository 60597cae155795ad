"""The automata of an engine's constraints, for the process that checks and the one that runs.

Takes a constraint as vLLM names it and the ids that end a text. The vocabulary is taken apart once
a tokenizer; compiled constraints are kept by ``compile_constraint``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.config import StructuredOutputsConfig
    from vllm.v1.structured_output.backend_types import StructuredOutputKey

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary


def automaton_of(
    key: StructuredOutputKey,
    end_ids: Collection[int],
    *,
    tokenizer: Any,
    vocab_size: int,
    config: StructuredOutputsConfig,
) -> TokenAutomaton:
    """The automaton of a constraint, from any thread.

    Args:
        key: kind and text of the constraint, as vLLM takes them from a request.
        end_ids: tokens that end a complete text, and stand nowhere else in it.
        tokenizer: of the engine.
        vocab_size: ids that its model has.
        config: how the engine was asked to read constraints.

    Raises:
        ConstraintError: malformed, not supported, too large, or nothing satisfies it.
    """
    kind, text = key
    return compile_constraint(
        kind.name.lower(),
        text,
        vocabulary=_vocabulary(tokenizer, vocab_size),
        end_ids=sorted(end_ids),
        any_whitespace=not config.disable_any_whitespace,
    )


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    return vocabulary_of(tokenizer, vocab_size)
