"""What every answer keeps of what its request asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.engine import carriers

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams


def assert_promises(asked: SamplingParams, answer: CompletionOutput, llm: LLM) -> None:
    """What is said keeps to the parameters, whatever the model wants to say."""
    tokens, extra = list(answer.token_ids), asked.extra_args or {}
    assert all(0 <= token < llm.model_config.get_vocab_size() for token in tokens)
    assert len(tokens) <= asked.max_tokens
    if asked.structured_outputs is None:
        assert len(tokens) >= asked.min_tokens
    assert ("diffusion_telemetry" in extra) == (carriers.telemetry_of(answer) is not None)
    given_ids = {at: extra["diffusion_seed_canvas"][at] for at in extra.get("diffusion_pinned", ())}
    for at, token in given_ids.items():
        # Only a stop string may end an answer before its last pin.
        assert tokens[at : at + 1] == [token] or (asked.stop and at >= len(tokens))
    if asked.allowed_token_ids:
        assert set(tokens) <= set(asked.allowed_token_ids)
    if not asked.allowed_token_ids:
        tokenizer = llm.get_tokenizer()
        for word in asked.bad_words:
            ids = tokenizer.encode(word, add_special_tokens=False)
            held = [tokens[at : at + len(ids)] for at in range(len(tokens))]
            starts = [at for at, each in enumerate(held) if each == ids]
            assert all(at + len(ids) - 1 in given_ids for at in starts), word
    if asked.logprobs is not None:
        assert len(answer.logprobs) == len(tokens)
        for token, position in zip(tokens, answer.logprobs, strict=True):
            assert position[token].logprob <= 0
            assert asked.logprobs <= len(position) <= asked.logprobs + 1
