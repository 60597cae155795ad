"""Cases for heads: hidden rows, an embedding, a rewrite that asks for everything, and the truth."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from threading import Barrier, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_diffusion.constrain.rewrite import Penalties, Rewrite, Truncation
from vllm_diffusion.head import logit_tiles
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary
from vllm_diffusion.records import CanvasStats, Noise, TensorRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

SCALE = 5.65
STATISTICS = ("entropy", "top_prob", "margin", "soft_embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a head is made of, and the rows it is called with."""

    hidden: Tensor
    embedding: Tensor
    temperature: Tensor
    noise: Noise
    softcap: float | None
    rewrite: Rewrite | None = None

    def rows(self, **changes: Any) -> Rows:
        rows = Rows(
            hidden=self.hidden,
            temperature=self.temperature,
            noise=self.noise,
            rewrite=self.rewrite,
        )
        return replace(rows, **changes)

    def truth(self) -> CanvasStats:
        """The definition, in fp64."""
        return self.reference(torch.float64)(self.rows())

    def reference(self, dtype: torch.dtype | None = None, max_rows: int = 1000) -> ReferenceHead:
        """The materialising head, its products in ``dtype`` or the model's."""
        embedding = self.embedding if dtype is None else self.embedding.to(dtype)

        def logits(hidden: Tensor) -> Tensor:
            products = hidden.to(embedding.dtype) @ embedding.T
            products = products if dtype == torch.float64 else products.float()
            if self.softcap is None:
                return products
            return products.div_(self.softcap).tanh_().mul_(self.softcap)

        return ReferenceHead(
            logits=logits,
            soft_embedding=lambda prob: prob.to(embedding.dtype) @ embedding * SCALE,
            max_rows=max_rows,
        )

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            output=self.embedding,
            embedding=self.embedding,
            size=len(self.embedding),
            softcap=self.softcap,
            scale=SCALE,
        )

    def streaming(self, budget: int = 1 << 28, **how: Any) -> StreamingHead:
        return StreamingHead(
            vocabulary=self.vocabulary(), whole=self.reference(), budget=budget, **how
        )


def make_case(
    seed: int = 0,
    *,
    canvases: int = 5,
    length: int = 8,
    vocab: int = 700,
    hidden: int = 32,
    softcap: float | None = 30.0,
    dtype: torch.dtype = torch.float32,
    rewrite: bool = False,
) -> Case:
    """Rows from flat to sharp, temperatures from 0.3 to 1.2."""
    generator = torch.Generator().manual_seed(seed)
    rows = canvases * length
    states = torch.randn(rows, hidden, generator=generator)
    states *= torch.logspace(-1, 0.7, rows)[torch.randperm(rows, generator=generator), None]
    embedding = torch.randn(vocab, hidden, generator=generator)
    return Case(
        hidden=states.to(dtype),
        embedding=embedding.to(dtype),
        temperature=torch.linspace(0.3, 1.2, canvases).repeat_interleave(length),
        noise=Noise(
            seed=torch.randint(1 << 32, (rows, 2), generator=generator),
            position=torch.arange(rows) + 100 * seed,
            step=torch.arange(rows) % 5,
        ),
        softcap=softcap,
        rewrite=make_rewrite(generator, canvases, length, vocab) if rewrite else None,
    )


def make_rewrite(
    generator: torch.Generator, canvases: int, length: int, vocab: int, width: int = 30
) -> Rewrite:
    """Every part at once, each for a random half of the canvases or a tenth of the rows."""
    rows = canvases * length

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocab, shape, generator=generator)

    def half(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    allowed = torch.where(half(canvases, 1) & half(canvases, width), ids(canvases, width), -1)
    text = ids(canvases, width)
    text[:, 1::3] = text[:, ::3]  # ids that are listed more than once, with the same numbers
    scale = 1 + torch.rand(vocab, generator=generator)
    offset = torch.rand(vocab, generator=generator)
    forbidden = torch.where(half(rows, width), ids(rows, width), -1)
    # Some rows may not say what alone they may say.
    canvas = torch.arange(canvases).repeat_interleave(length)
    forbidden = torch.where(half(rows, 1), forbidden, allowed[canvas])
    pinned = torch.where(torch.rand(rows, generator=generator) < 0.1, ids(rows), -1)
    return Rewrite(
        canvas=canvas,
        greedy=half(canvases),
        allowed=allowed,
        bias=(ids(canvases, width), torch.randn(canvases, width, generator=generator) * 3),
        penalties=Penalties(ids=text, scale=scale[text], offset=offset[text]),
        forbidden=forbidden,
        pinned=pinned,
        truncation=Truncation(
            min_p=torch.where(half(canvases), 0.02, 0.0),
            top_k=torch.where(half(canvases), 7, vocab),
            top_p=torch.where(half(canvases), 0.9, 1.0),
            sorts=True,
        ),
    )


def assert_same_tokens(ours: CanvasStats, truth: CanvasStats) -> None:
    for name in ("argmax", "sample"):
        one, other = getattr(ours, name), getattr(truth, name)
        assert torch.equal(one, other), f"{name} differs in rows {(one != other).nonzero()[:, 0]}"


def assert_no_worse(
    ours: CanvasStats, plain: CanvasStats, truth: CanvasStats, factor: float = 2.0
) -> None:
    """Root-mean-square errors at most ``factor`` times those of plain arithmetic."""
    for name in STATISTICS:
        right = getattr(truth, name).double()
        error = float((getattr(ours, name).double() - right).square().mean().sqrt())
        plainly = float((getattr(plain, name).double() - right).square().mean().sqrt())
        message = f"{name} is off by {error:.2e}, plain arithmetic by {plainly:.2e}"
        assert error <= factor * plainly + 1e-7, message


def pairs_of(one: TensorRecord, other: TensorRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors of two records by name; both have the same ones."""
    for field in fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            yield field.name, ours, theirs


def assert_same_shape(ours: CanvasStats, other: CanvasStats) -> None:
    for name, one, two in pairs_of(ours, other):
        assert one.shape == two.shape, name
        assert one.dtype == two.dtype, name


def counted_readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are read, every time that the vocabulary is; filled while the test runs."""
    seen: list[int] = []
    tiles = logit_tiles.tiles

    def counting(vocabulary, hidden, rewrite, **how):
        seen.append(len(hidden))
        return tiles(vocabulary, hidden, rewrite, **how)

    monkeypatch.setattr(logit_tiles, "tiles", counting)
    return seen


def over_ranks(case: Case, ranks: int, call) -> list:
    """Run ``call(head)`` once a rank, on its part of the embedding, and exchange what they send."""
    barrier, sent = Barrier(ranks), [None] * ranks

    def exchange(rank: int, values: Tensor) -> Tensor:
        sent[rank] = values.clone()
        barrier.wait(timeout=60)
        together = torch.stack(sent)
        barrier.wait(timeout=60)
        return together

    size = len(case.embedding) // ranks
    results: list = [None] * ranks

    def run(rank: int) -> None:
        own = case.embedding[rank * size : (rank + 1) * size]
        vocabulary = replace(
            case.vocabulary(),
            output=own,
            embedding=own,
            first=rank * size,
            gather=lambda values: exchange(rank, values),
            add=lambda values: exchange(rank, values).sum(dim=0),
        )
        head = StreamingHead(vocabulary=vocabulary, whole=case.reference(), budget=1 << 28)
        results[rank] = call(head)

    threads = [Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
