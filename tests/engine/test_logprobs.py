"""Log-probabilities are those of the step whose argmax was committed, and those of the prompt."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.inside import Inside
from helpers.parity import ENGINE, make_prompt
from helpers.probe import Probe
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.oracle import Oracle
    from helpers.probe import ProbedRun
    from vllm import LLM, RequestOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS = 32


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **ENGINE)


def run(llm: LLM, *requests: dict[str, Any], length: int = 11) -> list[RequestOutput]:
    """Answers to prompts of growing length; the seed of a request is its number."""
    wanted = {"max_tokens": 2 * CANVAS, "ignore_eos": True}
    return llm.generate(
        [{"prompt_token_ids": make_prompt(length + at, at)} for at in range(len(requests))],
        [SamplingParams(**(wanted | {"seed": at} | each)) for at, each in enumerate(requests)],
        use_tqdm=False,
    )


def committed_logits(probed: ProbedRun) -> torch.Tensor:
    """[T, V] logits of the step that finished the canvas of each committed token."""
    return torch.cat([canvas[-1].logits for canvas in probed.canvases])


def test_every_token_has_the_logprobs_of_the_step_that_decided_it(llm: LLM) -> None:
    asked = [{"logprobs": 3}, {}, {"logprobs": 0}, {"logprobs": 5, "max_tokens": CANVAS + 5}]
    with Probe() as probe:
        outputs = run(llm, *asked)
    for seed, (request, output) in enumerate(zip(asked, outputs, strict=True)):
        answer = output.outputs[0]
        if "logprobs" not in request:
            assert answer.logprobs is None
            continue
        count = request["logprobs"]
        logits = committed_logits(probe.run(seed))
        truth = logits.double().log_softmax(-1)
        assert len(answer.logprobs) == len(answer.token_ids)
        total = 0.0
        for at, (token, position) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert position[token].logprob == pytest.approx(float(truth[at, token]), abs=1e-4)
            assert position[token].rank == int((logits[at] >= logits[at, token]).sum())
            best = truth[at].topk(count)
            expected = {*best.indices.tolist(), token}
            assert set(position) == expected
            for rank, other in enumerate(best.indices.tolist()):
                value = float(best.values[rank])
                assert position[other].logprob == pytest.approx(value, abs=1e-4)
                assert position[other].rank == rank + 1
            total += position[token].logprob
        assert answer.cumulative_logprob == pytest.approx(total)


def test_logprobs_are_of_the_model_not_of_what_the_request_made_of_it(llm: LLM) -> None:
    wishes = {"logit_bias": {20: 100.0}, "temperature": 0.5, "logprobs": 1}
    with Probe() as probe:
        (output,) = run(llm, wishes)
    truth = committed_logits(probe.run(0)).log_softmax(-1)
    answer = output.outputs[0]
    assert set(answer.token_ids) == {20}
    for at, position in enumerate(answer.logprobs):
        assert position[20].logprob == pytest.approx(float(truth[at, 20]), abs=1e-4)
    assert max(position[20].rank for position in answer.logprobs) > 1


def test_asking_changes_no_token(llm: LLM) -> None:
    plain, asked = run(llm, {})[0], run(llm, {"logprobs": 4, "prompt_logprobs": 2})[0]
    assert plain.outputs[0].token_ids == asked.outputs[0].token_ids


def test_the_whole_vocabulary(engine: Callable[..., LLM], parity_checkpoint: Path) -> None:
    llm = engine(parity_checkpoint, max_logprobs=-1, **ENGINE)
    (output,) = run(llm, {"logprobs": -1, "max_tokens": 3})
    for position in output.outputs[0].logprobs:
        assert len(position) == 512
        mass = sum(torch.tensor([each.logprob for each in position.values()]).exp())
        assert float(mass) == pytest.approx(1.0, abs=1e-3)


def test_chosen_ids_and_a_read_that_may_say_nothing_else(llm: LLM) -> None:
    ids = [30, 31, 32]
    read = {"diffusion_constrained": True, "diffusion_read_only": True}
    requests = [
        {"logprob_token_ids": ids},
        {"logprob_token_ids": ids, "extra_args": read},
    ]
    with Probe() as probe:
        free, bound = (output.outputs[0] for output in run(llm, *requests))
    truth = committed_logits(probe.run(0)).log_softmax(-1)
    for at, (token, position) in enumerate(zip(free.token_ids, free.logprobs, strict=True)):
        assert set(position) == {token, *ids}
        for each in position:
            assert position[each].logprob == pytest.approx(float(truth[at, each]), abs=1e-4)

    assert len(bound.token_ids) == CANVAS
    assert set(bound.token_ids) <= set(ids)
    among = committed_logits(probe.run(1))[:, ids].log_softmax(-1)
    for at, (token, position) in enumerate(zip(bound.token_ids, bound.logprobs, strict=True)):
        assert set(position) == set(ids)
        for column, each in enumerate(ids):
            assert position[each].logprob == pytest.approx(float(among[at, column]), abs=1e-4)
        assert among[at, ids.index(token)] == among[at].max()


def test_a_prompt_is_scored_as_transformers_scores_it(llm: LLM, oracle: Oracle) -> None:
    (output,) = run(llm, {"prompt_logprobs": 2})
    prompt = make_prompt(11)
    logits = oracle.model.lm_head(oracle.encode(prompt).hidden)
    cap = oracle.model.config.get_text_config().final_logit_softcapping
    truth = (cap * torch.tanh(logits / cap)).log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    for at, (before, token) in enumerate(pairwise(range(11))):
        position = output.prompt_logprobs[token]
        assert position[prompt[token]].logprob == pytest.approx(
            float(truth[before, prompt[token]]), abs=1e-3
        )
        assert set(truth[before].topk(2).indices.tolist()) <= set(position), at


def test_chosen_ids_of_a_prompt(llm: LLM) -> None:
    prompt = make_prompt(11)
    # Row r scores ids as the token at 2 + r + 1: the one that stands there, and padding.
    ids = np.array([[token, -1] for token in prompt[3:]])
    (scored,) = run(llm, {"prompt_logprob_token_ids": ids, "prompt_logprob_start": 2})
    (full,) = run(llm, {"prompt_logprobs": 0})
    assert scored.prompt_token_id_logprobs.shape == ids.shape
    for row, (value, padding) in enumerate(scored.prompt_token_id_logprobs.tolist()):
        expected = full.prompt_logprobs[3 + row][prompt[3 + row]].logprob
        assert value == pytest.approx(expected, abs=1e-4)
        assert padding == -float("inf")


def test_prompt_logprobs_beside_canvases_and_in_chunks(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt_logprobs": 1}, {"prompt_logprobs": 0}, {"logprobs": 2}
    whole = run(llm, *asked, length=70)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", CANVAS + 8)
    with Probe() as probe:
        cut = run(llm, *asked, length=70)
    assert len(probe.run(0).prompt_chunks) > 1
    assert any(forward.prompts and forward.canvases for forward in probe.forwards)
    for one, other in zip(whole, cut, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
        for ours, theirs in zip(
            one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True
        ):
            assert (ours is None) == (theirs is None)
            for token in ours or ():
                assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_an_aborted_request_leaves_no_logprobs_behind(llm: LLM) -> None:
    plain = run(llm, {"logprobs": 1})[0].outputs[0]
    engine = llm.llm_engine
    wish = {"diffusion_max_steps": 1, "diffusion_fused_commit": False}
    asking = SamplingParams(max_tokens=CANVAS, logprobs=5, extra_args=wish)
    names = [f"aborted-{number}" for number in range(8)]
    for name in names:
        engine.add_request(name, {"prompt_token_ids": make_prompt(9)}, asking)
    engine.step()  # prompts
    engine.step()  # the only step of the canvases: their scores wait for the commit
    waiting = Inside(llm).model_state.logprobs._waiting
    assert len(waiting) == 8
    engine.abort_request(names)
    unasked = run(llm, *[{}] * 8)
    assert not waiting
    assert all(output.outputs[0].logprobs is None for output in unasked)
    again = run(llm, {"logprobs": 1})[0].outputs[0]
    assert again.logprobs == plain.logprobs


def test_modes_that_nothing_here_could_mean_are_refused_at_start(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="logprobs_mode=processed_logprobs is not supported"):
        EngineArgs(
            str(tiny_checkpoint), max_model_len=512, logprobs_mode="processed_logprobs"
        ).create_engine_config()


def test_raw_logits(engine: Callable[..., LLM], parity_checkpoint: Path) -> None:
    llm = engine(parity_checkpoint, logprobs_mode="raw_logits", **ENGINE)
    with Probe() as probe:
        (output,) = run(llm, {"logprobs": 1})
    logits = committed_logits(probe.run(0))
    answer = output.outputs[0]
    for at, (token, position) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert position[token].logprob == pytest.approx(float(logits[at, token]), abs=1e-4)
