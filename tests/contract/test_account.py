"""The worker notices rows that the scheduler should not have granted."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_diffusion.engine.account import Account
from vllm_diffusion.family import Family

pytestmark = pytest.mark.vllm


def batch_of(widths: list[int]) -> SimpleNamespace:
    """Slot 2 named no width: it gets 16, or what is left before 100. Slot 1 asked for 8."""
    return SimpleNamespace(
        req_ids=["a", "b"],
        idx_mapping_np=np.array([2, 1]),
        num_computed_tokens_np=np.array([90, 20]),
        num_scheduled_tokens=np.array(widths),
    )


@pytest.fixture
def account() -> Account:
    account = Account(Family(name="x", rule="entropy_bound"), slots=3, width=16, end=100)
    account.admit(1, 8, answer_end=30)
    account.admit(2, None, answer_end=95)
    return account


def test_what_was_asked_for_passes(account: Account):
    for widths in ([10, 8], [0, 0]):
        account.check(batch_of(widths), np.array(widths))


@pytest.mark.parametrize("widths", [[9, 8], [10, 7]], ids=["cut at the end", "cut by a budget"])
def test_a_canvas_of_another_width_is_named(account: Account, widths: list[int]):
    with pytest.raises(AssertionError, match=r"gave [ab] a canvas of [79] rows at"):
        account.check(batch_of(widths), np.array(widths))
