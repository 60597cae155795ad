"""The dense reference against code of others: the block-refinement pipeline of diffusers.

``LLaDA2Pipeline`` keeps to SDAR's rule: a grid that begins at position 0, an even split as floor, a
threshold. It hands over which positions count, as padding, and leaves the blocks to the model.
"""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.models.sdar.testing.checkpoint import MASK_ID, TinySpec, build_model
from vllm_diffusion.models.sdar.testing.reference import answer, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.testing.dense_reveal import Answer

diffusers = pytest.importorskip("diffusers", reason="diffusers, of the extra `test`, is missing")

BLOCK = 8
LENGTH = 20
UNSEEN = torch.finfo(torch.float32).min
PROMPTS = [
    [Random(length).randrange(10, 512) for _ in range(length)]
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7, 2 * BLOCK + 4)
]


@pytest.fixture(scope="module")
def decoder() -> Any:
    return build_model(TinySpec(block=BLOCK))


class Theirs(NamedTuple):
    tokens: list[int]
    steps: int


def theirs(decoder: Any, prompt: Sequence[int], *, threshold: float, **how: Any) -> Theirs:
    """What the pipeline answers, and in how many steps that had something to reveal."""

    def forward(ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> SimpleNamespace:
        seen = visible(ids.shape[1], BLOCK) & attention_mask[0].bool()
        bias = torch.zeros(seen.shape).masked_fill(~seen, UNSEEN)
        logits = decoder(ids, attention_mask=bias[None, None], position_ids=position_ids).logits
        logits[..., MASK_ID] = -torch.inf  # the pipeline trusts a model to say no mask
        return SimpleNamespace(logits=logits)

    def count(_pipeline: Any, _step: int, _of_block: int, kept: dict[str, Tensor]) -> dict:
        open_before.append(bool(kept["active_block"].any()))
        return {}

    pipeline = diffusers.LLaDA2Pipeline(forward, diffusers.BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    open_before: list[bool] = []
    end = how.pop("end", None)
    result = pipeline(
        input_ids=torch.tensor([prompt]),
        gen_length=LENGTH,
        block_length=BLOCK,
        num_inference_steps=how.pop("max_steps", BLOCK),
        threshold=threshold or 2.0,  # above any probability: the floor alone
        editing_threshold=None,
        eos_early_stop=end is not None,
        eos_token_id=end,
        mask_token_id=MASK_ID,
        output_type="seq",
        callback_on_step_end=count,
        callback_on_step_end_tensor_inputs=["active_block"],
        **how,
    )
    return Theirs(result.sequences[0].tolist(), sum(open_before))


def ours(decoder: Any, prompt: Sequence[int], *, tail_hidden: bool = True, **how: Any) -> Answer:
    """The reference's answer.

    Args:
        decoder: of Transformers.
        prompt: its ids.
        tail_hidden: the one difference: in the last block, the pipeline's rows do not see those
            behind the answer. SDAR's own loop shows them, and so do we.
        how: see ``reference.answer``.
    """

    def forward(*, attention_mask: Tensor, **rest: Any) -> Any:
        attention_mask[..., len(prompt) + LENGTH :] = UNSEEN
        return decoder(attention_mask=attention_mask, **rest)

    model = forward if tail_hidden else decoder
    return answer(model, prompt, LENGTH, mask_id=MASK_ID, block=BLOCK, **how)


def different(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


@for_each(
    prompt=PROMPTS,
    asked=[(0.0, 3), (0.0, BLOCK), (0.0, BLOCK + 3), (0.6, 3), (0.6, BLOCK), (0.85, BLOCK)],
)
def test_tokens_and_steps_are_the_pipelines(
    decoder: Any, prompt: list[int], asked: tuple[float, int]
) -> None:
    how = dict(zip(("threshold", "max_steps"), asked, strict=True))
    found, wanted = ours(decoder, prompt, **how), theirs(decoder, prompt, **how)
    assert found.tokens == wanted.tokens
    assert sum(found.steps) == wanted.steps


def test_only_the_last_block_differs_by_the_tail(decoder: Any) -> None:
    changed = 0
    for prompt in PROMPTS:
        shown = ours(decoder, prompt, tail_hidden=False, threshold=0.6)
        wanted = theirs(decoder, prompt, threshold=0.6)
        behind = len(prompt) + LENGTH
        first = behind // BLOCK * BLOCK - len(prompt)  # of the block that has a tail
        assert shown.tokens[:first] == wanted.tokens[:first]
        changed += different(shown.tokens, wanted.tokens)
    assert changed, "nothing saw the tail"


def test_an_answer_ends_where_the_pipelines_does(decoder: Any) -> None:
    for prompt in PROMPTS:
        end = ours(decoder, prompt, threshold=0.6).tokens[LENGTH // 2]
        assert end not in prompt, "the pipeline would not look behind it"
        found = ours(decoder, prompt, threshold=0.6, ends={end}, early=True)
        wanted = theirs(decoder, prompt, threshold=0.6, end=end)
        assert 0 < len(found.tokens) < LENGTH
        assert found.tokens == wanted.tokens[: len(found.tokens)]
        assert found.tokens[-1] == end


@pytest.mark.parametrize(
    "wrong",
    [{"causal_prompt": True}, {"grid_at_prompt_end": True}, {"threshold": 0.72}, {"max_steps": 7}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_wrong_is_noticed(decoder: Any, wrong: dict[str, Any]) -> None:
    right = {"threshold": 0.0 if "max_steps" in wrong else 0.6}
    changed = 0
    for prompt in PROMPTS:
        found, wanted = ours(decoder, prompt, **(right | wrong)), theirs(decoder, prompt, **right)
        changed += different(found.tokens, wanted.tokens)
    assert changed > 5
