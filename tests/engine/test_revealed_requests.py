"""What requests ask of models whose tokens are revealed for good: SDAR, on a grid, and LLaDA.

Validity as DiffusionGemma is held to it: any constraint, any parameters, greedy and sampled.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.promises import assert_promises
from helpers.random_requests import Shape, draw_prompt, draw_sampling
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.sdar.testing import checkpoint as sdar
from vllm_diffusion.testing.constraints import PROMPTS, draw_constraint

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM, CompletionOutput

pytestmark = pytest.mark.vllm

CANVAS, VOCAB = 32, 512


@dataclass(frozen=True, slots=True)
class Served:
    """An engine, and what is known of its model."""

    llm: LLM
    mask: int
    end: int
    on_grid: bool

    def first_width(self, prompt: int) -> int:
        return CANVAS - prompt % CANVAS if self.on_grid else CANVAS

    def ids(self, text: str) -> list[int]:
        return list(self.llm.get_tokenizer().encode(text, add_special_tokens=False))

    def ask(self, prompt: Any, **wishes: Any) -> CompletionOutput:
        """The answer to one request; what is no sampling parameter is an option of ours."""
        names = set(SamplingParams.__struct_fields__)
        sampling = {name: wishes.pop(name) for name in list(wishes) if name in names}
        extra = {f"diffusion_{name}": value for name, value in wishes.items()}
        prompt = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        asked = SamplingParams(seed=3, **sampling, extra_args=extra)
        return self.llm.generate([prompt], [asked], use_tqdm=False)[0].outputs[0]


@pytest.fixture(scope="session", params=["sdar", "llada"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "sdar":
        spec = sdar.TinySpec(block=CANVAS)
        return sdar.make_tiny_checkpoint(path, spec), sdar.MASK_ID, sdar.SPECIAL_TOKENS
    return llada.make_tiny_checkpoint(path), llada.MASK_ID, llada.SPECIAL_TOKENS


@pytest.fixture
def served(family: tuple[Path, int, tuple[str, ...]], engine_pool: EnginePool) -> Served:
    checkpoint, mask, _ = family
    on_grid = "sdar" in str(checkpoint)
    llm = engine_pool.get(checkpoint, **({"block_size": CANVAS} if on_grid else {}))
    return Served(llm, mask, llm.get_tokenizer().eos_token_id, on_grid)


def test_every_answer_keeps_to_its_constraint(served: Served) -> None:
    rng = random.Random(5)
    drawn = [draw_constraint(rng) for _ in range(8)]
    asked = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([0.9, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            logprobs=rng.choice([None, 1]),
            seed=number,
            max_tokens=200,
            structured_outputs=StructuredOutputsParams(**{each.kind: each.value}),
            extra_args={
                "diffusion_max_steps": rng.choice([1, 3, 8]),
                "diffusion_fused_commit": rng.random() < 0.5,
            },
        )
        for number, each in enumerate(drawn)
    ]
    outputs = served.llm.generate(rng.choices(PROMPTS, k=len(asked)), asked, use_tqdm=False)
    complete = 0
    for each, sampling, output in zip(drawn, asked, outputs, strict=True):
        (answer,) = output.outputs
        if answer.finish_reason == "stop":
            complete += 1
            assert each.accepts(answer.text), (each, answer.text)
        assert_promises(sampling, answer, served.llm)
        assert served.mask not in answer.token_ids
    assert complete >= len(drawn) - 2
    Inside(served.llm).assert_idle()


def test_promises_hold_in_any_company(served: Served) -> None:
    dice = random.Random(7)
    shape = Shape(canvas=CANVAS, vocab=VOCAB, max_steps=8, reveals=True)
    prompts, asked = [], []
    for number in range(16):
        prompt = draw_prompt(dice, served.llm.get_tokenizer(), 90)
        sampling = draw_sampling(dice, shape, seed=number)
        extra = sampling.extra_args
        if served.on_grid and "diffusion_seed_canvas" in extra:
            # The seed has to fit into what is left of the prompt's block.
            need = 1 + max(extra.get("diffusion_pinned", [0]))
            prompt = prompt[: len(prompt) // CANVAS * CANVAS + CANVAS - need] or prompt[:1]
            if served.first_width(len(prompt)) < need:
                prompt = prompt[:-need] or prompt[:1]
            width = served.first_width(len(prompt))
            extra["diffusion_seed_canvas"] = extra["diffusion_seed_canvas"][:width]
        prompts.append({"prompt_token_ids": prompt})
        asked.append(sampling)
    outputs = served.llm.generate(prompts, asked, use_tqdm=False)
    for sampling, output in zip(asked, outputs, strict=True):
        assert len(output.outputs) == sampling.n
        for answer in output.outputs:
            assert_promises(sampling, answer, served.llm)
            assert served.mask not in answer.token_ids
    Inside(served.llm).assert_idle()


def test_a_constraint_cannot_ask_for_the_mask(served: Served) -> None:
    asked = StructuredOutputsParams(regex="[ab]{2}")
    answer = served.ask(
        "x",
        structured_outputs=asked,
        max_tokens=8,
        stop_token_ids=[served.mask],
    )
    assert len(answer.text) == 2
    assert answer.finish_reason == "stop"
    token = {"type": "token", "token": served.mask}
    tag = json.dumps({"type": "structural_tag", "format": token})
    with pytest.raises(VLLMValidationError):
        served.ask("x", structured_outputs=StructuredOutputsParams(structural_tag=tag))


# ---- text on the canvas ----


def test_a_template_and_a_suffix_come_out_where_they_fit(served: Served) -> None:
    prompt = served.ids("Alice is a nurse.")[:9]
    for temperature in (0.0, 1.0):
        answer = served.ask(
            prompt, template=["a: ", 3, " b: ", 2], temperature=temperature, max_tokens=CANVAS
        )
        assert answer.finish_reason == "stop"
        assert answer.text.startswith("a: ")
        assert " b: " in answer.text
        seen: list[list[int]] = []
        answer = watched(served, seen, prompt, suffix=" the end", max_tokens=4)
        assert len(answer.token_ids) <= 4
        behind = served.ids(" the end")
        assert all(row[4 : 4 + len(behind)] == behind for row in seen)
        assert seen


def watched(
    served: Served, seen: list[list[int]], prompt: list[int], **wishes: Any
) -> CompletionOutput:
    """The same, with the canvas of every step: what stands in it before the step is decided."""
    canvas_sampler = Inside(served.llm).runner.sampler

    def observe(pool: Any, batch: Any, stats: Any, decision: Any) -> None:
        del stats, decision
        width = int(batch.width[0])
        if not bool(pool.causal[batch.slots[0]]):
            seen.append(pool.tokens[batch.slots[0], :width].tolist())

    canvas_sampler.observe = observe
    try:
        return served.ask(prompt, **wishes)
    finally:
        canvas_sampler.observe = None


@pytest.mark.parametrize(
    "wishes",
    [
        {"template": ["a: ", CANVAS, " b"], "max_tokens": 90},
        {"suffix": " the end", "max_tokens": CANVAS},
    ],
    ids=["template", "suffix"],
)
def test_text_that_reaches_behind_the_first_canvas_is_refused(
    served: Served, wishes: dict[str, Any]
) -> None:
    prompt = served.ids("Alice is a nurse.")[:9]
    with pytest.raises(VLLMValidationError, match="canvas") as refused:
        served.ask(prompt, **wishes)
    assert str(served.first_width(len(prompt))) in str(refused.value)


def test_a_seed_canvas_ends_with_its_block(served: Served) -> None:
    prompt = served.ids("Alice is a nurse.")[:9]
    width = served.first_width(len(prompt))
    seed = [20 + at for at in range(width)]
    answer = served.ask(prompt, seed_canvas=seed, pinned=[0, 5, width - 1], max_tokens=width)
    said = list(answer.token_ids)
    assert [said[at] for at in (0, 5)] == [20, 25]
    for wrong in (width + 1, CANVAS + 1):
        with pytest.raises(VLLMValidationError, match="diffusion_seed_canvas"):
            served.ask(prompt, seed_canvas=[20] * wrong, max_tokens=width)


def test_a_long_draft_begins_every_canvas_it_reaches(served: Served) -> None:
    prompt = served.ids("Alice is a nurse.")[:9]
    draft = "The capital of France is Paris, a city on the river. " * 3
    seen: list[list[int]] = []
    ids, width = served.ids(draft), served.first_width(len(prompt))
    assert len(ids) > width
    watched(
        served, seen, prompt, draft=draft, noise_level=0.2, max_tokens=len(ids), ignore_eos=True
    )
    at = 0
    for row in begun(seen, served.mask):
        here = ids[at : at + len(row)]
        kept = [
            token == given for token, given in zip(row, here, strict=False) if token != served.mask
        ]
        assert all(kept)
        if len(here) == len(row):
            assert sum(kept) > len(row) // 2
        at += len(row)
    assert at > width


def begun(seen: list[list[int]], mask: int) -> list[list[int]]:
    """The first input of every canvas: more masks than the one before, or other tokens."""
    first = [seen[0]]
    for before, row in pairwise(seen):
        pairs = zip(before, row, strict=False)
        if len(row) != len(before) or any(b not in {mask, r} for b, r in pairs):
            first.append(row)
    return first
