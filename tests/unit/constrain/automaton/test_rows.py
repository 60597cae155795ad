"""Statistics of rows under a constraint: against the marginals of tokens, by enumeration."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from helpers.cases import for_each
from helpers.chains import (
    Canvas,
    conditioned,
    enumerate_canvas,
    random_automaton,
    random_canvas,
    statistics_of,
)

from vllm_diffusion.constrain.automaton.rows import constrained

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.records import CanvasStats

LENGTH = 4


def found_of(automaton: TokenAutomaton, canvas: Canvas) -> CanvasStats:
    stats, classes = statistics_of(automaton, canvas.probs)
    class_of = torch.from_numpy(automaton.class_of)
    return constrained(stats, classes, conditioned(automaton, [canvas]), class_of)


@for_each(spread=[1.0, 6.0])
def test_statistics_are_those_of_the_marginals(spread: float) -> None:
    mixed = unread = negative = 0
    for seed in range(150):
        automaton = random_automaton(seed, states=2 + seed % 4, vocab=6, classes=4)
        canvas = random_canvas(seed, automaton, LENGTH, spread=spread)
        truth = enumerate_canvas(automaton, canvas)
        if truth.z == 0:
            continue
        found = found_of(automaton, canvas)
        rows, token = canvas.rows, truth.token
        entropy = -torch.xlogy(token, token).sum(dim=1)
        torch.testing.assert_close(found.entropy[:rows].double(), entropy, atol=5e-6, rtol=1e-5)
        said = found.argmax[:rows, None]
        top = token.gather(1, said)[:, 0]
        other = token.scatter(1, said, 0.0).amax(dim=1)
        torch.testing.assert_close(found.top_prob[:rows].double(), top, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.margin[:rows].double(), top - other, atol=1e-6, rtol=1e-5)
        mixed += int(((truth.ended > 0.01) & (truth.ended < 0.99)).sum())
        lost = (truth.ended > 0.01) & (token[:, automaton.class_of == 0].sum(dim=1) > 0.01)
        unread += int(lost.sum())
        negative += int((top < other - 1e-4).sum())
    # What makes it hard did occur.
    assert mixed > 20
    assert unread > 20
    assert negative > 0


def test_free_rows_keep_their_statistics_to_the_last_bit() -> None:
    automaton = random_automaton(1)
    canvas = replace(random_canvas(3, automaton, LENGTH), start=0, rows=2)
    own, _ = statistics_of(automaton, canvas.probs)
    found = found_of(automaton, canvas)
    for name in ("argmax", "sample", "entropy", "top_prob", "margin"):
        assert torch.equal(getattr(found, name)[2:], getattr(own, name)[2:]), name
        assert not torch.equal(getattr(found, name)[:2], getattr(own, name)[:2]), name
    assert torch.equal(found.soft_embedding, own.soft_embedding)


def test_an_impossible_canvas_keeps_them_too() -> None:
    automaton = random_automaton(1)
    canvas = replace(random_canvas(3, automaton, LENGTH), start=0, rows=LENGTH)
    probs = canvas.probs.clone()
    probs[0, automaton.class_of > 0] = 0.0
    own, classes = statistics_of(automaton, probs)
    posterior = conditioned(automaton, [replace(canvas, probs=probs)])
    assert posterior.log_z.item() == -torch.inf
    found = constrained(own, classes, posterior, torch.from_numpy(automaton.class_of))
    for name in ("argmax", "sample", "entropy", "top_prob", "margin"):
        assert torch.equal(getattr(found, name), getattr(own, name)), name


def test_the_sample_is_the_classes_where_the_row_is_read_and_the_rows_own_where_ended() -> None:
    automaton = random_automaton(23, states=3)
    canvas = replace(random_canvas(23, automaton, LENGTH, spread=1.0), start=0, rows=3, left=1)
    stats, classes = statistics_of(automaton, canvas.probs)
    stats = replace(stats, sample=torch.full_like(stats.sample, 70))
    drawn = torch.arange(LENGTH)[:, None] * 10 + torch.arange(automaton.num_classes)
    classes = replace(classes, sample=drawn)
    class_of = torch.from_numpy(automaton.class_of)
    ended = 0
    for uniforms in torch.rand(20, LENGTH, generator=torch.Generator().manual_seed(0)):
        posterior = conditioned(automaton, [replace(canvas, uniforms=uniforms)])
        found = constrained(stats, classes, posterior, class_of)
        for row, read_as in enumerate(posterior.sample_class[0].tolist()):
            ended += row < 3 and read_as < 0
            assert found.sample[row] == (70 if read_as < 0 else 10 * row + read_as)
    assert ended > 0


def test_a_model_at_odds_with_the_constraint_gives_no_nan() -> None:
    """Everything the constraint may say is a thousand nats below what the model wants."""
    automaton = random_automaton(20, states=3)
    canvas = replace(random_canvas(20, automaton, LENGTH), start=0, rows=LENGTH, left=1)
    stats, classes = statistics_of(automaton, canvas.probs)
    classes = replace(
        classes,
        log_mass=classes.log_mass - 1000,
        best_log_prob=classes.best_log_prob - 1000,
        second_log_prob=classes.second_log_prob - 1000,
    )
    posterior = conditioned(automaton, [canvas])  # the same: every row's masses fell alike
    assert posterior.log_z.item() > -torch.inf
    found = constrained(stats, classes, posterior, torch.from_numpy(automaton.class_of))
    for name in ("entropy", "top_prob", "margin"):
        assert bool(getattr(found, name).isfinite().all()), name
    assert bool((found.top_prob > 0).all())


def test_batches_are_flat_rows_in_order() -> None:
    automaton = random_automaton(20, states=3)
    canvases = [random_canvas(seed, automaton, LENGTH) for seed in range(5)]
    probs = torch.cat([canvas.probs for canvas in canvases])
    class_of = torch.from_numpy(automaton.class_of)
    whole = constrained(
        *statistics_of(automaton, probs), conditioned(automaton, canvases), class_of
    )
    for place, canvas in enumerate(canvases):
        alone = found_of(automaton, canvas)
        for name in ("argmax", "sample", "entropy", "top_prob", "margin"):
            mine = getattr(whole, name)[place * LENGTH : (place + 1) * LENGTH]
            assert torch.equal(mine, getattr(alone, name)), name
