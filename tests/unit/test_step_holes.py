"""``advance`` where the canvas is a text with holes: slack is dropped, the text stays."""

from __future__ import annotations

from itertools import pairwise

from helpers.cases import for_each
from helpers.table_model import LENGTH, Engine, TableModel

from vllm_diffusion.constrain.constraints import Constraints, Holes

PAD, END = 0, 1


def filled(
    template: list[int], seed: int, *, words: tuple[tuple[int, ...], ...] = (), steps: int = 12
) -> list[int]:
    """The output of a canvas whose rows are a template: -1 is a hole's, END behind the last."""
    rows = [*template, END]
    rows += [PAD] * (LENGTH - len(rows))
    engine = Engine(TableModel(seed=seed, sharpness=0.7))
    constraints = Constraints(
        seed_canvas=tuple(rows),
        pinned=tuple(at for at, token in enumerate(rows) if token >= 0),
        holes=Holes(shown=len(template) + 1, pad=PAD, end=-1),
        # Few ids, so that slack and bad words come up.
        allowed=(PAD, 5, 6),
        bad_words=words,
    )
    engine.admit(1, seed=seed, start=9, constraints=constraints)
    engine.pool.constants.max_steps[1] = steps
    engine.run_canvas(1)
    return engine.text[1, 9 : engine.start[1]].tolist()


def test_a_template_keeps_its_text_and_loses_its_slack() -> None:
    template = [20, 21, -1, -1, -1, 22, -1, -1, 23]
    lengths = set()
    for seed in range(20):
        said = filled(template, seed)
        assert [token for token in said if token not in {5, 6}] == [20, 21, 22, 23, END]
        assert said[:2] == [20, 21]
        assert said[-2:] == [23, END]
        lengths.add(len(said))
    assert len(lengths) > 2, "no canvas had slack"
    assert max(lengths) <= len(template) + 1


@for_each(steps=[1, 12])
def test_no_bad_word_closes_over_dropped_slack(steps: int) -> None:
    template = [20, -1, -1, -1, -1, -1, 21]
    word = (5, 6)
    closed = 0
    for seed in range(20):
        assert word not in pairwise(filled(template, seed, words=(word,), steps=steps))
        closed += word in pairwise(filled(template, seed, steps=steps))
    assert closed, "the word never came up"


def test_a_hole_before_a_suffix_ends_in_end_or_is_full() -> None:
    suffix = (30, 31, 32)
    ends = set()
    for seed in range(20):
        engine = Engine(TableModel(seed=seed, sharpness=0.7))
        rows = (-1,) * 5 + suffix
        constraints = Constraints(
            seed_canvas=rows,
            pinned=(5, 6, 7),
            holes=Holes(shown=5, pad=PAD, end=END),
            allowed=(PAD, 5, 6),
        )
        engine.admit(1, seed=seed, start=9, constraints=constraints)
        engine.run_canvas(1)
        said = engine.text[1, 9 : engine.start[1]].tolist()
        assert set(said[:-1]) <= {5, 6}
        assert len(said) == 5 or said[-1] == END
        ends.add(said[-1] == END)
    assert ends == {True, False}
