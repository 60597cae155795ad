"""What a request may set keeps its promise, whoever shares the batch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, VOCAB = 32, 512
PROMPT = [300, 17, 44, 300, 90, 21]


@pytest.fixture
def llm(engine: Callable[..., LLM]) -> LLM:
    return engine()


def answer(llm: LLM, prompt: Sequence[int] = PROMPT, **sampling: Any) -> list[int]:
    """Token ids of one request, two canvases unless told otherwise."""
    wanted = {"max_tokens": 2 * CANVAS, "ignore_eos": True, "seed": 3} | sampling
    output = llm.generate(
        {"prompt_token_ids": list(prompt)}, SamplingParams(**wanted), use_tqdm=False
    )
    return list(output[0].outputs[0].token_ids)


def options(**values: Any) -> dict[str, Any]:
    return {"extra_args": {f"diffusion_{name}": value for name, value in values.items()}}


# ---- temperature and seed ----


def test_temperature_0_always_gives_the_same_answer(llm: LLM) -> None:
    first = answer(llm, temperature=0, seed=None)
    assert answer(llm, temperature=0, seed=None) == first
    assert answer(llm, temperature=1, seed=None) != answer(llm, temperature=1, seed=None)


def test_neutral_values_are_the_published_rule(llm: LLM) -> None:
    plain = answer(llm)
    assert answer(llm) == plain
    assert answer(llm, temperature=1, top_p=1, top_k=-1, min_p=0, logit_bias={}) == plain
    assert answer(llm, top_k=VOCAB) == plain
    assert answer(llm, logit_bias={7: 0.0}, allowed_token_ids=list(range(VOCAB))) == plain
    served = {
        "t_min": 0.4,
        "t_max": 0.8,
        "entropy_bound": 0.1,
        "confidence_threshold": 0.005,
        "stability_threshold": 1,
        "hold_threshold": 0.0,
        "doubt_threshold": 0.0,
    }
    assert answer(llm, **options(**served)) == plain


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.3},
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        options(t_max=0.5),
        options(t_min=0.1),
        options(entropy_bound=5.0),
        options(seed_canvas=[9] * CANVAS),
        options(max_steps=3),
    ],
    ids=str,
)
def test_a_parameter_changes_the_answer_and_the_seed_still_fixes_it(
    llm: LLM, sampling: dict[str, Any]
) -> None:
    changed = answer(llm, **sampling)
    assert changed != answer(llm)
    assert answer(llm, **sampling) == changed
    assert answer(llm, **(sampling | {"seed": 4})) != changed


def steps_of(llm: LLM, **sampling: Any) -> int:
    """Denoising forwards of one canvas; it is the last, so no commit counts."""
    names = ("vllm:diffusion_num_denoising_steps", "vllm:diffusion_num_denoising_steps_total")

    def counted() -> float:
        return sum(m.value for m in llm.get_metrics() if m.name in names)

    before = counted()
    answer(llm, max_tokens=CANVAS, **sampling)
    return int(counted() - before)


def test_thresholds_decide_when_a_canvas_is_finished(llm: LLM) -> None:
    plain = steps_of(llm)
    surely = {"confidence_threshold": 100.0}
    # The first step's argmax has nothing to be compared with; without stability one step is enough.
    assert steps_of(llm, **options(**surely, stability_threshold=0)) == 1
    held = steps_of(llm, **options(**surely))
    assert 1 < held <= plain
    assert steps_of(llm, **options(confidence_threshold=0.0)) == 48
    # No more doubt than there are tokens: the first step is enough, and none below zero.
    assert steps_of(llm, **options(doubt_threshold=CANVAS + 1)) == 1
    assert steps_of(llm, **options(confidence_threshold=0.0, doubt_threshold=0.0)) == 48


# ---- what may be said ----


def test_allowed_ids_are_all_that_is_said(llm: LLM) -> None:
    assert set(answer(llm, allowed_token_ids=[7, 8, 9])) <= {7, 8, 9}
    assert set(answer(llm, allowed_token_ids=[511])) == {511}


def test_bias_forces_and_bans(llm: LLM) -> None:
    assert set(answer(llm, logit_bias={11: 100.0})) == {11}
    said = set(answer(llm))
    banned = dict.fromkeys(said, -100.0)
    assert not set(answer(llm, logit_bias=banned)) & said


def test_min_tokens_keeps_an_answer_from_ending(llm: LLM) -> None:
    eager = {"stop_token_ids": [11], "logit_bias": {11: 100.0}, "ignore_eos": False}
    assert answer(llm, **eager) == [11]
    for least in (5, CANVAS, CANVAS + 7):
        patient = answer(llm, **eager, min_tokens=least)
        assert len(patient) == least + 1
        assert patient.index(11) == least


def test_the_text_before_a_canvas_is_penalised_and_the_canvas_itself_is_not(llm: LLM) -> None:
    plain = answer(llm)
    for name in ("frequency_penalty", "presence_penalty"):
        penalised = answer(llm, **{name: 2.0})
        assert penalised[:CANVAS] == plain[:CANVAS], "nothing is committed before the first canvas"
        assert penalised[CANVAS:] != plain[CANVAS:]
    # The prompt counts for repetition alone.
    assert answer(llm, repetition_penalty=1.8)[:CANVAS] != plain[:CANVAS]


def test_a_strong_penalty_leaves_no_token_twice(llm: LLM) -> None:
    # Bias lifts few ids above all others, so that the second canvas would repeat the first.
    few = {"logit_bias": dict.fromkeys(range(100, 120), 20.0)}
    again = set(answer(llm, **few)[:CANVAS]) & set(answer(llm, **few)[CANVAS:])
    assert again
    rare = answer(llm, **few, repetition_penalty=1e6)
    assert not set(rare[:CANVAS]) & set(rare[CANVAS:])


def words_in(llm: LLM, tokens: list[int]) -> list[str]:
    """Neighbours whose text the tokenizer cuts into just these two again."""
    tokenizer = llm.get_tokenizer()
    texts = {tokenizer.decode(list(pair)): list(pair) for pair in pairwise(tokens)}
    return [
        text
        for text, pair in texts.items()
        if text == text.strip() and tokenizer.encode(text, add_special_tokens=False) == pair
    ]


@pytest.mark.parametrize("steps", [1, 4, 48])
def test_bad_words_are_not_said(llm: LLM, steps: int) -> None:
    limit = options(max_steps=steps)
    plain = answer(llm, **limit)
    words = words_in(llm, plain)
    assert words, "the answer holds no pair to forbid"
    tokenizer = llm.get_tokenizer()
    bad = {tuple(tokenizer.encode(word, add_special_tokens=False)) for word in words}
    assert bad <= set(pairwise(plain))
    clean = answer(llm, bad_words=words, **limit)
    assert not bad & set(pairwise(clean))
    assert len(clean) == len(plain)


def test_a_single_bad_token_is_not_said(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    single = [
        token
        for token in set(answer(llm))
        if (text := tokenizer.decode([token])) == text.strip()
        and text
        and tokenizer.encode(text, add_special_tokens=False) == [token]
    ]
    assert single
    clean = answer(llm, bad_words=[tokenizer.decode([token]) for token in single])
    assert not set(clean) & set(single)


# ---- seed canvas, pins, reads ----


def test_pins_are_said_and_stay_out_of_later_canvases(llm: LLM) -> None:
    given = [(37 * at) % 400 + 20 for at in range(CANVAS)]
    pins = [0, 5, 6, CANVAS - 1]
    pinned = answer(llm, **options(seed_canvas=given, pinned=pins))
    assert [pinned[at] for at in pins] == [given[at] for at in pins]
    later = [pinned[CANVAS + at] for at in pins]
    assert all(
        ours != theirs for ours, theirs in zip(later, [given[at] for at in pins], strict=True)
    )
    free = [at for at in range(CANVAS) if at not in pins]
    assert [pinned[at] for at in free] != [given[at] for at in free]


def test_an_answer_does_not_end_before_its_last_pin(llm: LLM) -> None:
    given = [20] * CANVAS
    eager = {"stop_token_ids": [11], "logit_bias": {11: 100.0}, "ignore_eos": False}
    pinned = answer(llm, **eager, **options(seed_canvas=given, pinned=[3, 9]))
    assert len(pinned) == 11
    assert (pinned[3], pinned[9], pinned[10]) == (20, 20, 11)


def test_pins_of_a_narrow_canvas(llm: LLM) -> None:
    narrow = options(canvas_length=8, seed_canvas=list(range(40, 48)), pinned=[7])
    pinned = answer(llm, max_tokens=16, **narrow)
    assert pinned[7] == 47
    assert pinned[15] != 47


def test_a_read_is_one_canvas_that_ignores_eos(llm: LLM) -> None:
    read = answer(
        llm,
        ignore_eos=False,
        stop_token_ids=[],
        logit_bias={llm.get_tokenizer().eos_token_id: 100.0},
        max_tokens=5 * CANVAS,
        **options(read_only=True, seed_canvas=[20] * CANVAS, pinned=[4]),
    )
    assert len(read) == CANVAS
    assert read[4] == 20


def test_a_slot_inherits_nothing_from_an_aborted_request(llm: LLM) -> None:
    plain = answer(llm)
    engine = llm.llm_engine
    wishes = SamplingParams(
        max_tokens=2 * CANVAS,
        temperature=0.0,
        logit_bias={11: 100.0},
        bad_words=["a"],
        presence_penalty=1.0,
        **options(seed_canvas=[20] * CANVAS, pinned=[0], t_max=0.5, stability_threshold=0),
    )
    names = [f"aborted-{number}" for number in range(8)]
    for name in names:
        engine.add_request(name, {"prompt_token_ids": PROMPT}, wishes)
    for _ in range(3):
        engine.step()
    engine.abort_request(names)
    assert [answer(llm) for _ in range(3)] == [plain] * 3
