"""Pinned rows have one id, and pins are found by absolute position."""

from __future__ import annotations

import torch

from vllm_diffusion.constrain.pins import by_position, pin


def test_a_pinned_row_has_one_id_whatever_its_logits_were() -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = -torch.inf
    result = pin(logits, torch.tensor([-1, 4, 0]))
    assert torch.equal(result[0], logits[0])
    assert result[1].softmax(-1).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert result[2].softmax(-1).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_list_is_read_by_absolute_position_and_nowhere_else() -> None:
    ids = torch.tensor([[7, -1, 9], [1, 2, 3]])
    first = torch.tensor([10, 4])
    position = torch.tensor([[9, 10, 11, 12, 13], [0, 4, 5, 6, 7]])
    assert by_position(ids, first, position).tolist() == [[-1, 7, -1, 9, -1], [-1, 1, 2, 3, -1]]


def test_the_canvas_behind_the_list_finds_nothing() -> None:
    ids = torch.tensor([[7, 8, 9, 10]])
    behind = 20 + 4 + torch.arange(4)[None]
    assert by_position(ids, torch.tensor([20]), behind).tolist() == [[-1] * 4]
