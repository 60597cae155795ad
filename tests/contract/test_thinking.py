"""What vLLM's reasoning parser for Gemma tells of the thinking before a constraint."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from vllm_diffusion.engine.constraints.thinking import told_by
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import build_tokenizer, token_id

pytestmark = pytest.mark.vllm

BEGIN, UNTIL = token_id("<|channel>"), token_id("<channel|>")


@cache
def reasoner() -> Any:
    from transformers import PreTrainedTokenizerFast
    from vllm.reasoning import ReasoningParserManager

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(512), eos_token="<eos>", pad_token="<pad>"
    )
    return ReasoningParserManager.get_reasoning_parser("gemma4")(
        tokenizer, chat_template_kwargs={"enable_thinking": True}
    )


def ids(text: str) -> list[int]:
    found: list[int] = build_tokenizer(512).encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|turn>user\nHi<turn|>\n<|turn>model\n", False),
        ("<|turn>model\n<|channel>thought\n", True),
        ("<|turn>model\n<|channel>thought\nhm<channel|>ok<turn|>\n<|turn>model\n", False),
        ("<|turn>user\nWhat is <|channel>?<turn|>\n<|turn>model\n", False),
        ("", False),
    ],
)
def test_thinking_begins_with_its_token_where_the_prompt_has_not_opened_it(
    prompt: str, opened: bool
) -> None:
    thinking = told_by(reasoner(), ids(prompt))
    assert thinking is not None
    assert thinking.until == UNTIL
    assert thinking.begin == (None if opened else BEGIN)
    assert thinking.tokens == 2 - opened


def test_no_special_token_is_a_thought() -> None:
    thinking = told_by(reasoner(), [])
    assert thinking is not None
    named = ("<|tool_call>", "<turn|>", "<|turn>", "<pad>", "<eos>", "<|channel>")
    assert {token_id(each) for each in named} <= set(thinking.forbidden)
    assert UNTIL not in thinking.forbidden
    assert not set(ids("plain text, 1 < 2\n")) & set(thinking.forbidden)
