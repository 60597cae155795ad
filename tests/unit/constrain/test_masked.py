"""What a head is asked where a grammar leaves few ids."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.heads import make_case

from vllm_diffusion.constrain.logits import rewrite_logits
from vllm_diffusion.constrain.masked import under_mask
from vllm_diffusion.constrain.rewrite import Rewrite


def test_rows_asked_again_keep_what_their_requests_want() -> None:
    vocab = 120
    case = make_case(3, canvases=6, length=8, vocab=vocab, rewrite=True)
    rewrite = case.rewrite
    assert rewrite is not None
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(48, vocab, generator=generator)
    rows = torch.tensor([2, 17, 9, 47])
    # Few ids, many, most: listed as allowed or as forbidden.
    masks = [torch.rand(vocab, generator=generator) < share for share in (0.1, 0.4, 0.6, 0.95)]
    asked = under_mask(rewrite, rows, masks)
    ours = rewrite_logits(logits[rows], asked)
    # As the whole batch is, had the row's canvas listed the ids, and were there no pins.
    for place, row in enumerate(rows.tolist()):
        canvas = int(rewrite.canvas[row])
        mine = set(masks[place].nonzero()[:, 0].tolist())
        mine = mine & set(rewrite.allowed[canvas].tolist()) or mine
        lists = torch.full((6, vocab), -1)
        lists[canvas, : len(mine)] = torch.tensor(sorted(mine))
        wanted = rewrite_logits(logits, replace(rewrite, allowed=lists, pinned=None))[row]
        assert torch.equal(ours[place], wanted)
        left = set((ours[place] > -torch.inf).nonzero()[:, 0].tolist())
        assert left
        assert left <= mine
    assert asked.pinned is None
    assert asked.greedy.tolist() == rewrite.greedy[rewrite.canvas[rows]].tolist()
    for name in ("min_p", "top_k", "top_p"):
        cut, whole = getattr(asked.truncation, name), getattr(rewrite.truncation, name)
        assert cut.tolist() == whole[rewrite.canvas[rows]].tolist()


def test_a_grammar_wins_where_nothing_else_is_left() -> None:
    masks = [torch.zeros(10, dtype=torch.bool) for _ in range(2)]
    masks[0][[4, 5]] = masks[1][[6, 7, 8]] = True
    rewrite = Rewrite(
        canvas=torch.tensor([0, 0, 1, 1]),
        allowed=torch.tensor([[1, 2], [7, -1]]),
        forbidden=torch.tensor([[4, 5], [4, 5], [7, 7], [7, 7]]),
        pinned=torch.tensor([9, 9, 9, 9]),
    )
    asked = under_mask(rewrite, torch.tensor([1, 3]), masks)
    left = rewrite_logits(torch.zeros(2, 10), asked) > -torch.inf
    assert [row.nonzero()[:, 0].tolist() for row in left] == [[4, 5], [7]]
    alone = under_mask(None, torch.tensor([1, 3]), masks)
    left = rewrite_logits(torch.zeros(2, 10), alone) > -torch.inf
    assert [row.nonzero()[:, 0].tolist() for row in left] == [[4, 5], [6, 7, 8]]
