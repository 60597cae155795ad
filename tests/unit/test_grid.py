"""The account that scheduler and worker keep, played through against texts that are written out."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vllm_diffusion import grid
from vllm_diffusion.family import Family, Text

BLOCK = 8
LIMIT = 10_000


def family_of(text: Text, *, horizon: bool = False) -> Family:
    block = BLOCK if text is not Text.CAUSAL else None
    return Family(name=str(text), rule="entropy_bound", text=text, block=block, horizon=horizon)


def played(family: Family, prompt: int, answer: int, *, fused: bool, chunk: int) -> list[range]:
    """The rows of every step of a request, two denoising steps a canvas, as a scheduler asks."""
    computed, steps = 0, []
    while computed < prompt:
        upto = min(prompt, computed + chunk)
        steps.append(range(computed, upto))
        before, computed = computed, grid.kept_of_text(family, upto=upto, known=prompt)
        if upto == prompt:
            break
        assert computed > before, "a chunk of the prompt made no progress"
    known = prompt
    while known < prompt + answer:
        width = grid.canvas_width(family, known=known, asked=BLOCK, end=LIMIT)
        assert width > 0
        for last in (False, True):
            front = grid.text_rows(family, known=known, computed=computed)
            behind = grid.horizon_rows(family, known=known, width=width, answer_end=prompt + answer)
            steps.append(range(known - front, known + width + behind))
            computed = grid.kept_of_canvas(family, known=known)
            if last and not fused:
                steps.append(range(computed, known + width))
                computed = grid.kept_of_commit(family, known=known, count=width)
        known += width
    return steps


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("text", [*Text])
def test_every_step_begins_where_the_cache_is_final(text: Text, *, fused: bool) -> None:
    """What lies before the first row of a step is never written again, but where nothing counts."""
    for prompt in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3):
        for chunk in (BLOCK, 2 * BLOCK + 1, LIMIT):
            steps = played(family_of(text), prompt, 3 * BLOCK, fused=fused, chunk=chunk)
            for step, following in pairwise(steps):
                assert following.start <= step.stop, "a position was left out"
            if text is Text.WHOLE:
                canvases = [step for step in steps if step.stop > prompt]
                assert {step.start for step in canvases} == {0}


def test_on_a_grid_every_denoising_step_is_one_block() -> None:
    family = family_of(Text.BLOCK)
    for prompt in range(1, 3 * BLOCK):
        steps = played(family, prompt, 2 * BLOCK, fused=False, chunk=LIMIT)[1:]
        assert {len(step) for step in steps} == {BLOCK}
        assert {step.start % BLOCK for step in steps} == {0}


def test_the_first_canvas_on_a_grid_ends_at_the_next_grid_point() -> None:
    family = family_of(Text.BLOCK)
    widths = [
        grid.canvas_width(family, known=known, asked=99, end=LIMIT) for known in (16, 17, 23, 24)
    ]
    assert widths == [8, 7, 1, 8]


def test_causal_text_counts_once_and_a_canvas_never_before_its_commit() -> None:
    family = family_of(Text.CAUSAL)
    assert grid.canvas_width(family, known=20, asked=BLOCK, end=25) == 5
    assert grid.kept_of_text(family, upto=13, known=20) == 13
    assert grid.kept_of_canvas(family, known=20) == 20
    assert grid.kept_of_commit(family, known=20, count=5) == 25
    assert grid.text_rows(family, known=25, computed=20) == 5


def test_a_horizon_ends_with_the_answer() -> None:
    family = family_of(Text.WHOLE, horizon=True)
    lengths = [
        grid.horizon_rows(family, known=known, width=BLOCK, answer_end=30)
        for known in (0, 14, 22, 28)
    ]
    assert lengths == [22, 8, 0, 0]
    assert grid.horizon_rows(family_of(Text.WHOLE), known=0, width=BLOCK, answer_end=30) == 0


def test_a_family_is_the_same_after_json() -> None:
    import json

    family = Family(
        name="x", rule="entropy_bound", mask_id=7, text=Text.BLOCK, block=4, ends=(1, 2)
    )
    again = Family.from_dict(json.loads(json.dumps(family.to_dict())))
    assert again == family
    assert isinstance(again.text, Text)
