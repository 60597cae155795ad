"""Cases for statistics by class, and how they are held to the definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helpers.heads import Case, assert_same_tokens

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.class_stats import ClassStats
    from vllm_diffusion.records import CanvasStats

NUMBERS = ("log_mass", "entropy", "best_log_prob", "second_log_prob")
TOKENS = ("best", "sample")
COUNT = 12


def classes_of(vocab: int, seed: int = 0, count: int = COUNT) -> Tensor:
    """Classes of every size: half of the ids, a few, one, none, and 0 for some."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(count, generator=generator) ** 4
    size[:2] = torch.tensor([0.3, 1.0])
    size[2:4] = 0.0
    class_of = torch.multinomial(size, vocab, replacement=True, generator=generator)
    class_of[torch.randint(vocab, (1,), generator=generator)] = 2  # one token; 3 has none
    return class_of.int()


def both(case: Case, head, class_of: Tensor, count: int = COUNT) -> tuple[CanvasStats, ClassStats]:
    return head.by_class(case.rows(), class_of=class_of, num_classes=count)


def assert_tokens(ours: ClassStats, truth: ClassStats) -> None:
    for name in TOKENS:
        one, other = getattr(ours, name), getattr(truth, name)
        assert one.dtype == torch.int64
        assert torch.equal(one, other), f"{name} differs at {(one != other).nonzero()}"


def assert_numbers(ours: ClassStats, plain: ClassStats, truth: ClassStats) -> None:
    """Finite where the truth is, and errors at most twice those of plain arithmetic."""
    for name in NUMBERS:
        one, right = getattr(ours, name), getattr(truth, name).double()
        finite = right.isfinite()
        assert one.dtype == torch.float32
        assert torch.equal(one.isfinite(), finite), name
        assert torch.equal(one[~finite].double(), right[~finite]), name
        if not finite.any():
            continue
        error = (one.double() - right)[finite].square().mean().sqrt()
        plainly = (getattr(plain, name).double() - right)[finite].square().mean().sqrt()
        message = f"{name} is off by {error:.2e}, plain arithmetic by {plainly:.2e}"
        assert float(error) <= 2 * float(plainly) + 1e-6, message


def check(case: Case, class_of: Tensor, count: int = COUNT) -> None:
    _, truth = both(case, case.reference(torch.float64), class_of, count)
    _, plain = both(case, case.reference(), class_of, count)
    stats, ours = both(case, case.streaming(), class_of, count)
    assert_same_tokens(stats, case.truth())
    assert_tokens(ours, truth)
    assert_numbers(ours, plain, truth)
