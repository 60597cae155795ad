"""Tool calls as Gemma 4 writes them, as a grammar.

<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm_diffusion.constrain.language.calls import grammar_of_calls
from vllm_diffusion.constrain.language.syntax import Choice, Node, Text, mark, sequence, text
from vllm_diffusion.models.diffusion_gemma.tools.layout import CallLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.constrain.language.calls import AskedCalls
    from vllm_diffusion.constrain.language.syntax import Grammar

CALL_TOKENS: Final = {"begin": "<|tool_call>", "end": "<tool_call|>", "quote": '<|"|>'}
"""The special tokens that calls are written with, by their names in ``AskedCalls.tokens``."""


def call_grammar(asked: AskedCalls) -> Grammar:
    """The grammar of an answer that calls tools.

    Args:
        asked: its tokens are those of ``CALL_TOKENS``.

    Raises:
        ConstraintError: see ``grammar_of_calls``.
    """
    tokens = asked.tokens

    def written(calls: Sequence[tuple[Node, Node]]) -> Node:
        begin = sequence(Text(mark(tokens["begin"])), text("call:"))
        named = Choice(tuple(sequence(names, arguments) for names, arguments in calls))
        return sequence(begin, named, Text(mark(tokens["end"])))

    return grammar_of_calls(asked, CallLayout(tokens["quote"]), written)
