"""Allowed ids, bias and forbidden ids against the plain loop over rows and ids."""

from __future__ import annotations

import torch

from vllm_diffusion.constrain.tokens import add_bias, allow_only, forbid

INF = float("inf")


def random_logits(rows: int, vocab: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 5


def test_only_listed_ids_keep_their_logits() -> None:
    logits = random_logits(4)
    lists = [[3], [0, 10, 5], [], [7, 7, 0]]
    width = max(len(each) for each in lists)
    ids = torch.tensor([[*each, *[-1] * (width - len(each))] for each in lists])
    result = allow_only(logits, ids)
    for row, listed in enumerate(lists):
        for token in range(11):
            kept = not listed or token in listed
            assert float(result[row, token]) == (float(logits[row, token]) if kept else -INF)


def test_a_listed_first_id_beside_padding_keeps_a_low_logit() -> None:
    # Padding points at id 0 too: whoever wrote last must not decide.
    logits = torch.tensor([[-50.0, 3.0, 4.0]])
    assert allow_only(logits, torch.tensor([[0, -1, -1]])).tolist() == [[-50.0, -INF, -INF]]
    assert allow_only(logits, torch.tensor([[1, -1, -1]])).tolist() == [[-INF, 3.0, -INF]]


def test_bias_is_added_to_its_ids_and_padding_changes_no_bit() -> None:
    logits = random_logits(3)
    ids = torch.tensor([[2, 5], [0, 0], [9, 0]])
    bias = torch.tensor([[1.5, -100.0], [0.0, 0.0], [7.0, 0.0]])
    result = add_bias(logits, ids, bias)
    expected = logits.clone()
    expected[0, 2] += 1.5
    expected[0, 5] -= 100.0
    expected[2, 9] += 7.0
    assert torch.equal(result, expected)


def test_forbidden_ids_get_no_probability() -> None:
    logits = random_logits(3)
    result = forbid(logits, torch.tensor([[4, 4, -1], [-1, -1, -1], [0, 10, 2]]))
    expected = logits.clone()
    expected[0, 4] = -INF
    expected[2, [0, 10, 2]] = -INF
    assert torch.equal(result, expected)


def test_a_row_with_nothing_left_keeps_what_was_allowed() -> None:
    logits = allow_only(random_logits(2), torch.tensor([[3, 6], [3, 6]]))
    result = forbid(logits, torch.tensor([[3, 6], [3, -1]]))
    assert torch.equal(result[0], logits[0])
    assert result[1].isfinite().nonzero().tolist() == [[6]]


def test_the_arguments_stay_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    allow_only(logits, torch.tensor([[1], [2]]))
    add_bias(logits, torch.tensor([[1], [2]]), torch.ones(2, 1))
    forbid(logits, torch.tensor([[1], [2]]))
    assert torch.equal(logits, before)
