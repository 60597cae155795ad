"""Steps scheduled before the results of the last are known, as on a GPU: the same answers.

vLLM switches that off on a CPU, where it gains nothing; the engine here has it all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vllm_diffusion.engine.scheduler import AsyncCanvasScheduler, CanvasScheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import LLM, CompletionOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, MAX_MODEL_LEN = 32, 256
SEA = "The capital of France is Paris, a city on the river Seine. " * 2
TOO_LARGE = r"(a|b)*a(a|b){14}"
"""For an automaton: a parser keeps it."""
PEOPLE = {
    "type": "array",
    "maxItems": 2,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}


def asked(
    *, max_tokens: int | None = 70, extra: dict[str, Any] | None = None, **sampling: Any
) -> SamplingParams:
    if constraint := sampling.pop("constraint", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**constraint)
    options = {"diffusion_max_steps": 5, "diffusion_telemetry": True} | (extra or {})
    return SamplingParams(**{"seed": 1} | sampling, max_tokens=max_tokens, extra_args=options)


def requests() -> dict[str, SamplingParams]:
    pinned = {"diffusion_seed_canvas": [*range(40, 72)], "diffusion_pinned": [3, 9, 30]}
    return {
        "plain": asked(ignore_eos=True),
        "to the end": asked(ignore_eos=True, max_tokens=None),
        "narrow": asked(ignore_eos=True, extra={"diffusion_canvas_length": 8}),
        "preset": asked(extra={"diffusion_preset": "balanced"}),
        "greedy": asked(seed=None, temperature=0),
        "cut": asked(top_k=20, top_p=0.9, min_p=0.01, ignore_eos=True),
        "penalised": asked(repetition_penalty=1.3, bad_words=["the sea"], min_tokens=40),
        "logprobs": asked(logprobs=2, prompt_logprobs=1, ignore_eos=True),
        "stopped": asked(stop=["a", "e"]),
        "pinned": asked(extra=pinned, ignore_eos=True),
        "template": asked(extra={"diffusion_template": ["ab", 4, "cd", 6, "."]}),
        "drafted": asked(extra={"diffusion_draft": "the sea is blue"}),
        "choice": asked(constraint={"choice": [SEA]}, max_tokens=100),
        "schema": asked(constraint={"json": PEOPLE}, logprobs=2),
        "patient": asked(constraint={"regex": "[a-d]*"}, min_tokens=CANVAS + 4),
        "parsed": asked(constraint={"regex": TOO_LARGE}),
        "parsed, several": asked(constraint={"regex": TOO_LARGE}, n=2, seed=6),
    }


def said(answer: CompletionOutput) -> tuple[Any, ...]:
    """All that an answer says but how its canvases were committed."""
    scores = [
        # Other requests are in a batch, so products may round otherwise.
        {token: pytest.approx(each.logprob, abs=1e-3) for token, each in place.items()}
        for place in answer.logprobs or ()
    ]
    canvases = answer.diffusion.canvases  # type: ignore[attr-defined]
    told = [(each.steps, each.stopped_by, each.tokens) for each in canvases]
    return list(answer.token_ids), answer.text, answer.finish_reason, scores, told


def answers(llm: LLM) -> dict[str, list[Any]]:
    wishes = requests()
    prompts = [f"hello {number}" for number in range(len(wishes))]
    outputs = llm.generate(prompts, list(wishes.values()), use_tqdm=False)
    return {
        name: [said(answer) for answer in output.outputs]
        for name, output in zip(wishes, outputs, strict=True)
    }


def test_every_kind_of_request_is_answered_alike(
    engine: Callable[..., LLM], parity_checkpoint: Any
) -> None:
    options = {"checkpoint": parity_checkpoint, "max_model_len": MAX_MODEL_LEN}
    llm = engine(**options)
    assert isinstance(Inside(llm).scheduler, CanvasScheduler)
    one_by_one = answers(llm)
    assert len({str(each) for each in one_by_one.values()}) == len(one_by_one)
    llm = engine(async_scheduling=True, **options)
    assert isinstance(Inside(llm).scheduler, AsyncCanvasScheduler)
    for name, answer in answers(llm).items():
        assert answer == one_by_one[name], name
    for moment in (3, 8):
        assert preempted_at(llm, moment) == one_by_one["parsed"][0][0]


def preempted_at(llm: LLM, moment: int) -> list[int]:
    """The tokens of a request that a parser keeps and that loses its place at some step."""
    wish = requests()["parsed"]
    wish.output_kind = RequestOutputKind.DELTA
    index = [*requests()].index("parsed")
    llm.llm_engine.add_request("0", f"hello {index}", wish)
    given: list[int] = []
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step == moment:
            Inside(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            given += output.outputs[0].token_ids
        step += 1
        assert step < 200
    return given
