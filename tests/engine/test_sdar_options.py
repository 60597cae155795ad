"""What a request may set, on an engine whose canvases are blocks of a grid: it keeps its promise.

One engine. Tokens are held to the dense loop where it has the option, to the model's own
distribution where they are drawn, and to the request itself elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each
from helpers.frequencies import assert_frequencies
from helpers.inside import Inside
from helpers.regimes import prompt_of
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_diffusion.models.sdar.testing import checkpoint as maker
from vllm_diffusion.models.sdar.testing.reference import answer as dense_answer
from vllm_diffusion.models.sdar.testing.reference import visible
from vllm_diffusion.testing.dense_reveal import dense_logits

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM
    from vllm.outputs import RequestOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SPEC = maker.TinySpec()
BLOCK, MASK = SPEC.block, maker.MASK_ID
PROMPTS = [
    prompt_of(length, length, vocab=SPEC.vocab, special=len(maker.SPECIAL_TOKENS))
    for length in (BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3)
]
"""One, none and three tokens behind the last point of the grid."""
LENGTH = 5 * BLOCK + 2
DRAWS = 3000


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.make_tiny_checkpoint(tmp_path_factory.mktemp("sdar"), SPEC)


@pytest.fixture(scope="session")
def model() -> Any:
    return maker.build_model(SPEC)


@pytest.fixture
def llm(engine_pool: EnginePool, checkpoint: Path) -> LLM:
    return engine_pool.get(checkpoint, max_num_seqs=64)


def outputs(llm: LLM, asked: list[tuple[tuple[int, ...], dict[str, Any]]]) -> list[RequestOutput]:
    """The answers to prompts and what is asked of each, all at once."""
    defaults = {"max_tokens": LENGTH, "ignore_eos": True, "temperature": 0}
    parameters = []
    for _, sampling in asked:
        extra = sampling.get("extra_args")
        fresh = {} if extra is None else {"extra_args": dict(extra)}
        parameters.append(SamplingParams(**{**defaults, **sampling, **fresh}))
    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in asked]
    return llm.generate(prompts, parameters, use_tqdm=False)


def answers(llm: LLM, *asked: dict[str, Any], prompt: tuple[int, ...] = PROMPTS[0]) -> Any:
    """The tokens of one request after the other, each alone in the engine."""
    said = [list(outputs(llm, [(prompt, each)])[0].outputs[0].token_ids) for each in asked]
    return said[0] if len(said) == 1 else said


def options(**values: Any) -> dict[str, Any]:
    return {"extra_args": {f"diffusion_{name}": value for name, value in values.items()}}


# ---- the rule ----


@for_each(
    prompt=PROMPTS,
    asked=[
        {"max_steps": 1},
        {"max_steps": 3},
        {"max_steps": 9},
        {"reveal_threshold": 0.0},
        {"reveal_threshold": 0.3, "max_steps": 2},
    ],
)
def test_its_constants_are_those_of_the_dense_loop(
    llm: LLM, model: Any, prompt: tuple[int, ...], asked: dict[str, Any]
) -> None:
    names = {"reveal_threshold": "threshold", "max_steps": "max_steps"}
    wanted = dense_answer(
        model,
        prompt,
        LENGTH,
        mask_id=MASK,
        block=BLOCK,
        **{names[name]: value for name, value in asked.items()},
    )
    (output,) = outputs(llm, [(prompt, options(**asked, telemetry=True))])
    assert list(output.outputs[0].token_ids) == wanted.tokens
    told = output.outputs[0].diffusion
    assert [canvas.steps for canvas in told.canvases] == wanted.steps
    assert told.denoise_forwards == sum(wanted.steps)


@pytest.mark.parametrize(
    ("sampling", "sharper", "kept"),
    [({}, 1.0, None), ({"temperature": 0.5}, 2.0, None), ({"top_k": 3}, 1.0, 3)],
    ids=["plain", "temperature", "top_k"],
)
def test_one_step_draws_from_the_models_own_distribution(
    llm: LLM, model: Any, sampling: dict[str, Any], sharper: float, kept: int | None
) -> None:
    prompt = PROMPTS[1]
    tokens = [*prompt, *[MASK] * BLOCK]
    logits = dense_logits(model, tokens, visible(len(tokens), BLOCK))[-BLOCK:]
    logits[:, MASK] = -torch.inf
    logits *= sharper
    if kept is not None:
        logits = logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -torch.inf)
    asked = {"temperature": 1, "max_tokens": BLOCK} | sampling | options(max_steps=1)
    drawn = outputs(llm, [(prompt, asked | {"seed": seed}) for seed in range(DRAWS)])
    draws = torch.tensor([list(output.outputs[0].token_ids) for output in drawn])
    for at in range(BLOCK):
        assert_frequencies(draws[:, at], logits[at].softmax(dim=-1))
    # Positions of a step are drawn on their own: pairs of the likeliest two ids of each.
    first, second = (logits[at].topk(2).indices for at in (0, 1))
    cell = 2 * (draws[:, :1] == first).long().argmax(1) + (draws[:, 1:2] == second).long().argmax(1)
    both = (draws[:, :1] == first).any(1) & (draws[:, 1:2] == second).any(1)
    alone = [logits[at].softmax(dim=-1)[ids] for at, ids in ((0, first), (1, second))]
    assert both.sum() > DRAWS / 50
    assert_frequencies(cell[both], torch.outer(*alone).flatten())


# ---- seeds ----


def test_a_seed_says_the_same_alone_and_among_others(llm: LLM) -> None:
    asked = [
        (prompt, {"temperature": 1, "seed": seed, "max_tokens": LENGTH + seed})
        for seed in range(8)
        for prompt in PROMPTS
    ]
    together = [list(each.outputs[0].token_ids) for each in outputs(llm, asked)]
    alone = [answers(llm, sampling, prompt=prompt) for prompt, sampling in asked[:6]]
    assert together[:6] == alone
    assert [list(each.outputs[0].token_ids) for each in outputs(llm, asked[::-1])][::-1] == together
    assert len({tuple(tokens[:LENGTH]) for tokens in together}) == len(together)


def test_n_answers_are_several_seeds(llm: LLM) -> None:
    (first,) = outputs(llm, [(PROMPTS[0], {"temperature": 1, "seed": 5, "n": 3})])
    (again,) = outputs(llm, [(PROMPTS[0], {"temperature": 1, "seed": 5, "n": 3})])
    said = [list(each.token_ids) for each in first.outputs]
    assert said == [list(each.token_ids) for each in again.outputs]
    assert len({tuple(tokens) for tokens in said}) == 3
    assert said[0] == answers(llm, {"temperature": 1, "seed": 5})


# ---- where an answer ends ----


def test_it_is_cut_at_any_length(llm: LLM) -> None:
    for prompt in PROMPTS:
        whole = answers(llm, {}, prompt=prompt)
        cut = outputs(llm, [(prompt, {"max_tokens": most}) for most in range(1, 2 * BLOCK + 2)])
        for most, output in enumerate(cut, 1):
            assert list(output.outputs[0].token_ids) == whole[:most]
            assert output.outputs[0].finish_reason == "length"


def test_it_stops_at_an_id_wherever_that_stands_in_a_block(llm: LLM) -> None:
    for prompt in PROMPTS:
        whole = answers(llm, {}, prompt=prompt)
        asked = [(prompt, {"stop_token_ids": [token]}) for token in whole]
        for token, output in zip(whole, outputs(llm, asked), strict=True):
            said = output.outputs[0]
            assert list(said.token_ids) == whole[: whole.index(token) + 1]
            assert (said.finish_reason, said.stop_reason) == ("stop", token)
    Inside(llm).assert_idle()


@for_each(fused=[True, False])
def test_a_canvas_takes_no_step_for_what_nobody_reads(llm: LLM, fused: bool) -> None:
    extra = {
        "diffusion_reveal_by": "leftmost",
        "diffusion_reveal_threshold": 0.0,
        "diffusion_fused_commit": fused,
        "diffusion_telemetry": True,
    }
    for prompt in PROMPTS:
        whole = answers(llm, {"extra_args": extra}, prompt=prompt)
        asked = [(prompt, {"stop_token_ids": [token], "extra_args": extra}) for token in whole]
        for token, output in zip(whole, outputs(llm, asked), strict=True):
            said, end = output.outputs[0], len(prompt) + whole.index(token)
            assert list(said.token_ids) == whole[: whole.index(token) + 1]
            # One position a step, from the grid point or the prompt's end to the id.
            begun = max(len(prompt), end - end % BLOCK)
            assert said.diffusion.canvases[-1].steps == end + 1 - begun
    Inside(llm).assert_idle()


def test_it_stops_at_a_string_in_or_across_blocks(llm: LLM) -> None:
    (output,) = outputs(llm, [(PROMPTS[0], {})])
    text = output.outputs[0].text
    stops = [text[at : at + 3] for at in range(0, len(text) - 3, 2)]
    asked = [(PROMPTS[0], {"stop": [stop]}) for stop in stops]
    for stop, stopped in zip(stops, outputs(llm, asked), strict=True):
        assert stopped.outputs[0].text == text[: text.index(stop)]
        assert stopped.outputs[0].stop_reason == stop


def test_no_end_comes_before_the_least_length(llm: LLM) -> None:
    end = maker.token_id(maker.TURN_END)
    wanted = {"logit_bias": {end: 100.0}, "ignore_eos": False}
    assert answers(llm, wanted) == [end]
    for least in (1, BLOCK, BLOCK + 1):
        said = answers(llm, wanted | {"min_tokens": least})
        assert said.index(end) == least
        assert len(said) == least + 1


# ---- what may be said ----


def test_only_allowed_ids_are_said_and_the_mask_never(llm: LLM) -> None:
    allowed = [MASK, 40, 41, 300]
    said = answers(llm, {"temperature": 1, "seed": 1, "allowed_token_ids": allowed})
    assert set(said) <= {40, 41, 300}
    assert set(answers(llm, {"logit_bias": {MASK: 100.0, 55: 99.0}})) == {55}
    with pytest.raises(VLLMValidationError, match="this model may say none"):
        answers(llm, {"allowed_token_ids": [MASK]})


def test_a_mask_in_the_prompt_is_text(llm: LLM, model: Any) -> None:
    # Not of masks alone: rows that are all alike would be ranked by their rounding.
    for prompt in ((300, MASK, 41, 42, MASK), (300, *(MASK,) * BLOCK)):
        wanted = dense_answer(model, prompt, LENGTH, mask_id=MASK, block=BLOCK)
        assert answers(llm, {}, prompt=prompt) == wanted.tokens


def test_penalties_count_what_has_been_revealed(llm: LLM) -> None:
    one_by_one = options(reveal_threshold=0.0)
    plain = answers(llm, one_by_one)
    assert len(set(plain)) < len(plain), "nothing is repeated, so nothing can be penalised"
    fewer = answers(llm, {"repetition_penalty": 1e4, **one_by_one})
    assert len(set(fewer)) > len(set(plain))
    more = answers(llm, {"frequency_penalty": -2.0, "presence_penalty": -2.0, **one_by_one})
    assert len(set(more)) < len(set(plain))


# ---- log-probabilities ----


def test_the_best_ids_are_those_of_the_step_that_reveals(llm: LLM, model: Any) -> None:
    prompt = PROMPTS[1]
    tokens = [*prompt, *[MASK] * BLOCK]
    logits = dense_logits(model, tokens, visible(len(tokens), BLOCK))[-BLOCK:]
    logits[:, MASK] = -torch.inf
    own = logits.log_softmax(dim=-1)
    # A temperature and a cut change what is drawn, not what is told.
    asked = {"temperature": 2.0, "top_k": 50, "seed": 4, "logprobs": 5, "max_tokens": BLOCK}
    (output,) = outputs(llm, [(prompt, asked | options(max_steps=1))])
    said = output.outputs[0]
    for at, (token, told) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
        best = own[at].topk(5)
        assert {*best.indices.tolist(), token} == set(told)
        for id_, each in told.items():
            assert each.logprob == pytest.approx(float(own[at, id_]), abs=1e-4)
            assert each.rank == int((own[at] > own[at, id_]).sum()) + 1


# ---- leaving ----


def test_a_request_that_leaves_in_mid_canvas_leaves_nothing(llm: LLM) -> None:
    wanted = answers(llm, {})
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        engine.add_request(f"leaves-{number}", {"prompt_token_ids": list(prompt)}, sampling)
    for _ in range(7):
        engine.step()
    engine.abort_request([f"leaves-{number}" for number in range(len(PROMPTS))])
    while engine.has_unfinished_requests():
        engine.step()
    assert answers(llm, {}) == wanted
    Inside(llm).assert_idle()


def test_an_answer_ends_where_the_model_does(llm: LLM) -> None:
    most = llm.llm_engine.model_config.max_model_len
    for room in (1, BLOCK - 1, BLOCK, BLOCK + 1):
        prompt = prompt_of(most - room, 7, vocab=SPEC.vocab, special=len(maker.SPECIAL_TOKENS))
        (output,) = outputs(llm, [(prompt, {"max_tokens": None})])
        assert len(output.outputs[0].token_ids) == room
        assert output.outputs[0].finish_reason == "length"
