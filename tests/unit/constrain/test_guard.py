"""The guard of one request, and what a head is asked where a grammar leaves few ids."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.grammars import (
    ARITHMETIC,
    BRACKETS,
    END,
    JSON,
    OTHER_END,
    SILENT,
    TREE,
    VOCABULARY,
    compiled,
    compiler,
)
from helpers.heads import make_case

from vllm_diffusion.constrain.guard import Guard, Guards, under_mask
from vllm_diffusion.constrain.rewrite import rewrite_logits
from vllm_diffusion.records import Rewrite


def guard_of(grammar: tuple[str, str], **options: object) -> Guard:
    options = {"end_tokens": [END]} | options
    return compiler().guard(compiled(grammar), **options)  # type: ignore[arg-type]


def ids(*pieces: str) -> list[int]:
    return [VOCABULARY.index(piece.encode()) for piece in pieces]


def legal(guard: Guard) -> list[int]:
    mask = guard.legal()
    assert mask.shape == (len(VOCABULARY),)
    return mask.nonzero()[:, 0].tolist()


def random_text(guard: Guard, rng: random.Random, most: int) -> list[int]:
    """Tokens that may stand one behind the other; the guard has looked ahead at them."""
    tokens: list[int] = []
    while len(tokens) < most and (not tokens or tokens[-1] != END):
        tokens.append(rng.choice(legal(guard)))
        assert guard.walk(tokens[-1:]) == 1
    return tokens


def test_a_walk_stops_at_the_first_illegal_token() -> None:
    guard = guard_of(JSON)
    tokens = ids("{", '"a"', ":", "1", "}", ",")
    assert guard.walk(tokens) == 5
    guard.rewind()
    assert guard.walk([SILENT, *tokens]) == 0
    assert guard.walk(tokens[:3]) == 3
    assert guard.walk(tokens[3:]) == 2, "it goes on from where the last walk came to"


def test_an_end_token_ends_a_complete_text_alone_and_what_follows_is_free() -> None:
    guard = guard_of(JSON)
    whole = ids("{", "}")
    assert guard.walk([END]) == 0
    assert guard.walk([*whole[:1], END]) == 1
    guard.rewind()
    assert guard.walk([*whole, END, SILENT, *ids("(", "]"), END]) == 7
    guard.rewind()
    assert guard.walk([*whole, SILENT]) == 2
    guard.write([*whole, END])
    assert guard.walk([SILENT, 5, END]) == 3


def test_a_request_says_what_ends_its_text() -> None:
    guard = guard_of(JSON, end_tokens=[OTHER_END, SILENT])
    whole = ids("{", "}")
    for end, legal in ((OTHER_END, 4), (SILENT, 4), (END, 2)):
        assert guard.walk([*whole, end, *whole[:1]]) == legal
        guard.rewind()


@pytest.mark.parametrize("grammar", [JSON, ARITHMETIC, BRACKETS, TREE], ids=str)
def test_the_mask_holds_just_what_may_be_read(grammar: tuple[str, str]) -> None:
    rng = random.Random(1)
    guard = guard_of(grammar)
    for _ in range(30):
        mask = legal(guard)
        for token in range(len(VOCABULARY)):
            assert (guard.walk([token]) == 1) == (token in mask)
            guard.rewind()
        guard.write([choice := rng.choice(mask)])
        if choice == END:
            break


@pytest.mark.parametrize("grammar", [JSON, ARITHMETIC, BRACKETS, TREE], ids=str)
def test_looking_ahead_leaves_no_trace_and_a_rebuilt_guard_is_the_same(
    grammar: tuple[str, str],
) -> None:
    rng = random.Random(2)
    for _ in range(20):
        guard, written = guard_of(grammar), []
        for _ in range(6):
            for _ in range(2):
                random_text(guard, rng, 9)
                guard.rewind()
            tokens = random_text(guard, rng, rng.randrange(1, 6))
            guard.write(tokens)
            written += tokens
            rebuilt = guard_of(grammar, written=written)
            if END in written:
                assert guard.walk([SILENT] * 3) == rebuilt.walk([SILENT] * 3) == 3
                break
            assert legal(guard) == legal(rebuilt)


def test_what_a_request_may_not_write_any_more_is_free() -> None:
    open_text, rest = ids("{", '"a"'), [SILENT] * 4
    guard = guard_of(JSON, tokens_left=2)
    assert guard.walk([*open_text, *rest]) == 6
    guard.rewind()
    assert guard.walk([open_text[0], *rest]) == 1
    guard.write(open_text[:1])
    assert guard.walk([open_text[1], *rest]) == 5
    # One that comes back is told what is left behind what it has written.
    again = guard_of(JSON, tokens_left=1, written=open_text[:1])
    assert again.walk(rest) == 0
    assert again.walk([open_text[1], *rest]) == 5


def test_an_illegal_text_cannot_be_written() -> None:
    guard = guard_of(JSON)
    with pytest.raises(ValueError, match="behind 1 others"):
        guard.write(ids("{", "]"))


def test_a_text_that_no_token_can_continue_is_ended() -> None:
    dead_end = ("grammar", 'root ::= "a" "b" "xyz" "c"')
    guard = guard_of(dead_end)
    guard.write(ids("a"))
    assert legal(guard) == ids("b", "ab")[:1]
    assert guard.walk([END]) == 0
    guard.write(ids("b"))
    assert legal(guard) == [END]
    assert guard.walk(ids("c")) == 0
    assert guard.walk([END, SILENT]) == 2
    guard.rewind()
    assert guard.walk([SILENT]) == 0, "looking ahead at the end leaves no trace"
    guard.write([END])
    assert guard.walk([SILENT]) == 1


def test_slots_hold_the_guard_of_their_last_owner() -> None:
    guards = Guards()
    assert guards.of([0, 1, 2]) == {}
    one, two = guard_of(JSON), guard_of(BRACKETS)
    guards.admit(2, one)
    guards.admit(5, two)
    assert guards.of([5, 0, 2]) == {0: two, 2: one}
    assert guards.of([0, 1]) == {}
    guards.admit(2, None)
    guards.release(5)
    guards.release(5)
    assert guards.of([5, 0, 2]) == {}


# ---- what the head is asked ----


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
