"""The guard of one request, and the guards of slots."""

from __future__ import annotations

import random

import pytest
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

from vllm_diffusion.constrain.guard import Guard, Guards


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
