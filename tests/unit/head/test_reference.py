"""The readable head against the same arithmetic in fp64."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers.cases import for_each
from torch import Tensor

from vllm_diffusion.constrain.logits import rewrite_logits
from vllm_diffusion.constrain.rewrite import Rewrite, Truncation
from vllm_diffusion.head import reference
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.records import CanvasStats, Noise

ROWS, HIDDEN, VOCAB, SOFTCAP = 21, 32, 700, 30.0
SCALE = HIDDEN**0.5


def make_inputs(seed: int = 0) -> tuple[Tensor, Rows]:
    """An embedding, and rows from flat to sharp."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    hidden *= torch.logspace(-1, 0.7, ROWS)[:, None]
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    temperature = torch.linspace(0.3, 1.2, ROWS)
    noise = Noise(
        seed=torch.tensor([1, 2]).expand(ROWS, 2),
        position=torch.arange(ROWS),
        step=torch.arange(ROWS) % 5,
    )
    return embedding, Rows(
        hidden=hidden, temperature=temperature, noise=noise, sample_prob=True, own_prob=True
    )


def rows_of(logits: Tensor, temperature: float = 1.0) -> Rows:
    """[R, V] logits, as the hidden rows of a head that passes them on."""
    counter = torch.arange(len(logits))
    return Rows(
        hidden=logits,
        temperature=torch.full((len(logits),), temperature),
        noise=Noise(
            seed=torch.zeros(len(logits), 2, dtype=torch.int64), position=counter, step=counter * 0
        ),
    )


def make_head(embedding: Tensor, max_rows: int = 1000) -> ReferenceHead:
    return ReferenceHead(
        logits=lambda hidden: SOFTCAP * torch.tanh(hidden @ embedding.T / SOFTCAP),
        soft_embedding=lambda prob: prob @ embedding * SCALE,
        max_rows=max_rows,
    )


@for_each(seed=range(3))
def test_statistics_equal_fp64(seed: int) -> None:
    embedding, rows = make_inputs(seed)
    stats = make_head(embedding)(rows)
    logits = SOFTCAP * torch.tanh(rows.hidden.double() @ embedding.double().T / SOFTCAP)
    prob = (logits / rows.temperature.double()[:, None]).softmax(-1)
    entropy = -torch.xlogy(prob, prob).sum(-1)
    top = prob.topk(2, dim=-1).values

    assert torch.equal(stats.argmax, prob.argmax(-1))
    assert_near(stats.entropy, entropy, 2e-5)
    assert_near(stats.top_prob, top[:, 0], 2e-5)
    assert_near(stats.margin, top[:, 0] - top[:, 1], 2e-5)
    assert_near(stats.soft_embedding, prob @ embedding.double() * SCALE, 3e-4)
    assert torch.equal(stats.sample, sample_rows(prob.float(), rows.noise))
    drawn = stats.sample[:, None]
    assert_near(stats.sample_prob, prob.gather(1, drawn)[:, 0], 2e-5)
    assert_near(stats.own_prob, logits.softmax(-1).gather(1, drawn)[:, 0], 2e-5)


def test_nobody_pays_for_what_no_rule_reads() -> None:
    embedding, rows = make_inputs()
    stats = make_head(embedding)(replace(rows, sample_prob=False, own_prob=False))
    assert stats.sample_prob is stats.own_prob is None


def test_the_own_probability_knows_of_no_wish() -> None:
    embedding, rows = make_inputs(4)
    greedy = torch.tensor([True, False, False])
    canvas = torch.arange(ROWS) * 3 // ROWS
    allowed = torch.tensor([[-1] * 3, [-1] * 3, [5, 9, 650]])
    bias = torch.tensor([[7], [0], [9]]), torch.tensor([[4.0], [0.0], [-2.0]])
    cut = Truncation(
        min_p=torch.zeros(3),
        top_k=torch.tensor([VOCAB, 4, VOCAB]),
        top_p=torch.ones(3),
        sorts=True,
    )
    rewrite = Rewrite(canvas=canvas, greedy=greedy, allowed=allowed, bias=bias, truncation=cut)
    stats = make_head(embedding)(replace(rows, rewrite=rewrite))
    logits = SOFTCAP * torch.tanh(rows.hidden.double() @ embedding.double().T / SOFTCAP)
    drawn = stats.sample[:, None]
    assert_near(stats.own_prob, logits.softmax(-1).gather(1, drawn)[:, 0], 2e-5)
    assert torch.equal(stats.sample[canvas == 0], stats.argmax[canvas == 0])
    assert torch.equal(stats.sample_prob[canvas == 0], stats.top_prob[canvas == 0])
    wished = rewrite_logits(logits, rewrite) / rows.temperature.double()[:, None]
    kept = wished.where(wished >= wished.topk(4).values[:, 3:], -torch.inf)
    wished = torch.where((canvas == 1)[:, None], kept, wished)
    assert_near(stats.sample_prob, wished.softmax(-1).gather(1, drawn)[:, 0], 2e-5)


def test_banned_ids_do_not_exist() -> None:
    embedding, rows = make_inputs(5)
    logits = SOFTCAP * torch.tanh(rows.hidden.double() @ embedding.double().T / SOFTCAP)
    banned = tuple(logits.argmax(-1).unique().tolist())
    head = replace(make_head(embedding), banned=banned)
    stats = head(rows)
    logits[:, list(banned)] = -torch.inf
    assert torch.equal(stats.argmax, logits.argmax(-1))
    drawn = stats.sample[:, None]
    assert not set(stats.sample.tolist()) & set(banned)
    assert_near(stats.own_prob, logits.softmax(-1).gather(1, drawn)[:, 0], 2e-5)
    scores = head.scores(rows.hidden, stats.argmax, count=3)
    assert_near(scores.values, logits.log_softmax(-1).gather(1, scores.ids), 2e-5)
    assert scores.ranks.tolist() == [1] * ROWS
    assert not set(head.candidates(rows, 5).flatten().tolist()) & set(banned)
    class_of = torch.zeros(VOCAB, dtype=torch.int32)
    class_of[list(banned)] = 1
    _, classes = head.by_class(rows, class_of=class_of, num_classes=2)
    assert classes.log_mass[:, 1].tolist() == [-torch.inf] * ROWS


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    worst = float((ours.double() - truth).abs().max())
    assert worst < tolerance, f"off by {worst:.2e}, allowed {tolerance:.0e}"


def test_the_arithmetic_between_the_callables_adds_no_error_of_its_own() -> None:
    # Given exact logits, what is left is one fp32 log_softmax: compare with that error, not with a
    # number tuned until it passes.
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(9)) * 8
    head = ReferenceHead(
        logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=64
    )
    stats = head(rows_of(logits))
    truth = logits.double().softmax(-1)
    plain = (logits.softmax(-1).double() - truth).abs().max()
    assert float((stats.soft_embedding.double() - truth).abs().max()) <= 2 * float(plain) + 1e-7
    entropy = -torch.xlogy(truth, truth).sum(-1)
    p = logits.softmax(-1)
    plain_entropy = (-(p * logits.log_softmax(-1)).sum(-1).double() - entropy).abs().max()
    assert float((stats.entropy.double() - entropy).abs().max()) <= 2 * float(plain_entropy) + 1e-7


@for_each(max_rows=[1, 2, 7, 20, ROWS, 10_000])
def test_chunks_equal_the_whole(max_rows: int) -> None:
    embedding, rows = make_inputs()
    whole = make_head(embedding)(rows)
    chunked = make_head(embedding, max_rows)(rows)
    for field in fields(CanvasStats):
        one, other = getattr(whole, field.name), getattr(chunked, field.name)
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        # A matrix product of fewer rows may sum in another order; ids must not care.
        if one.is_floating_point():
            assert_near(one, other.double(), 1e-4)
        else:
            assert torch.equal(one, other)


def test_a_gpu_that_reads_rows_in_one_kernel_takes_more_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It makes fewer copies of the logits, unless a request changes them."""
    embedding, rows = make_inputs()
    seen: list[int] = []

    def on_gpu(logits: Tensor, own: Tensor, part: Rows) -> CanvasStats:
        assert own is logits
        seen.append(len(logits))
        return part.unread()

    monkeypatch.setattr(reference, "_in_one_kernel", lambda part: not part.self_conditioning)
    monkeypatch.setattr(reference, "_on_gpu", lambda: on_gpu)
    rows = replace(rows, self_conditioning=False)
    head = make_head(embedding, max_rows=4)
    head(rows)
    assert seen == [16, 5]
    seen.clear()
    head(replace(rows, rewrite=Rewrite(canvas=torch.zeros(ROWS, dtype=torch.int64))))
    assert seen == [4, 4, 4, 4, 4, 1]


def test_no_more_than_max_rows_of_logits_exist_at_once() -> None:
    embedding, rows = make_inputs()
    seen = []
    plain = make_head(embedding)

    def logits(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return plain.logits(hidden)

    head = ReferenceHead(logits=logits, soft_embedding=plain.soft_embedding, max_rows=8)
    head(rows)
    assert seen == [8, 8, 5]


def test_masked_ids_have_no_probability_and_no_entropy() -> None:
    logits = torch.zeros(4, 10)
    logits[:, 3:] = -torch.inf
    head = ReferenceHead(logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=4)
    stats = head(rows_of(logits, 0.5))
    assert stats.entropy.tolist() == pytest.approx([1.0986123] * 4)
    assert int(stats.sample.max()) < 3
    assert stats.top_prob.tolist() == pytest.approx([1 / 3] * 4)
    assert stats.margin.tolist() == pytest.approx([0.0] * 4)


def test_a_certain_row_has_zero_entropy_and_full_margin() -> None:
    logits = torch.full((1, 10), -200.0)
    logits[0, 6] = 200.0
    head = ReferenceHead(logits=lambda hidden: hidden, soft_embedding=lambda p: p, max_rows=4)
    stats = head(rows_of(logits))
    assert (int(stats.argmax), int(stats.sample)) == (6, 6)
    assert float(stats.entropy) == 0.0
    assert float(stats.top_prob) == float(stats.margin) == 1.0


@for_each(temperature=[0.1, 0.4, 0.8, 3.0])
def test_entropy_is_as_exact_as_the_published_one(temperature: float) -> None:
    # The published rule takes the entropy from torch.distributions.Categorical. Both round, in
    # other places; ours may not be the worse one.
    scaled = torch.randn(256, VOCAB, generator=torch.Generator().manual_seed(2)) * 6 / temperature
    head = ReferenceHead(logits=lambda hidden: hidden, soft_embedding=lambda p: p, max_rows=256)
    stats = head(rows_of(scaled))
    truth = torch.distributions.Categorical(logits=scaled.double()).entropy()
    published = torch.distributions.Categorical(logits=scaled).entropy()
    assert_near(stats.entropy, truth, 2 * float((published.double() - truth).abs().max()) + 1e-7)


def test_scores_are_of_temperature_1_and_rank_as_vllm_does() -> None:
    embedding, rows = make_inputs(1)
    hidden = rows.hidden
    logits = SOFTCAP * torch.tanh(hidden.double() @ embedding.double().T / SOFTCAP)
    truth = logits.log_softmax(-1)
    tokens = torch.arange(ROWS) * 7
    for max_rows in (4, 1000):
        scores = make_head(embedding, max_rows).scores(hidden, tokens, count=5)
        assert scores.ids[:, 0].tolist() == tokens.tolist()
        assert torch.equal(scores.ids[:, 1:], truth.topk(5).indices)
        assert_near(scores.values, truth.gather(1, scores.ids), 2e-5)
        above = (truth >= truth.gather(1, tokens[:, None])).sum(1)
        assert scores.ranks.tolist() == above.tolist()
    alone = make_head(embedding).scores(hidden, tokens, count=0)
    assert alone.ids.shape == alone.values.shape == (ROWS, 1)
    every = make_head(embedding).scores(hidden, tokens, count=-1)
    assert every.ids.shape == (ROWS, 1 + VOCAB)


def test_scores_of_chosen_ids() -> None:
    embedding, rows = make_inputs(2)
    hidden = rows.hidden
    logits = SOFTCAP * torch.tanh(hidden.double() @ embedding.double().T / SOFTCAP)
    ids = (3, 600, 40)
    tokens = torch.tensor(ids)[torch.arange(ROWS) % 3]
    beside = make_head(embedding).scores(hidden, tokens, count=3, ids=ids)
    assert beside.ids[:, 1:].tolist() == [list(ids)] * ROWS
    assert_near(beside.values[:, 1:], logits.log_softmax(-1)[:, ids], 2e-5)
    among = make_head(embedding).scores(hidden, tokens, count=3, ids=ids, among=True)
    truth = logits[:, ids].log_softmax(-1)
    assert_near(among.values[:, 1:], truth, 2e-5)
    chosen = truth.gather(1, (torch.arange(ROWS) % 3)[:, None])
    assert_near(among.values[:, :1], chosen, 2e-5)
    assert among.ranks.tolist() == (truth >= chosen).sum(1).tolist()
    raw = make_head(embedding).scores(hidden, tokens, count=3, ids=ids, raw_logits=True)
    assert_near(raw.values[:, 1:], logits[:, ids], 3e-4)
