"""Rules, recursion and depth, against a recogniser that follows the rules directly."""

from itertools import product

import pytest
from helpers.cases import for_each

from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    NOTHING,
    Call,
    Chars,
    Grammar,
    Repeat,
    choice,
    optional,
    sequence,
    text,
)
from vllm_diffusion.errors import AutomatonError, ConstraintError


def networks(root="s", max_states=1000, **rules):
    return Networks(Grammar(rules, root), max_states=max_states)


def nesting(word):
    """How deep a balanced word of parentheses nests; None: it is not balanced."""
    height = deepest = 0
    for mark in word:
        height += 1 if mark == "(" else -1
        deepest = max(deepest, height)
        if height < 0:
            return None
    return deepest if height == 0 else None


@for_each(depth=range(4))
def test_self_embedding_nests_as_deep_as_allowed(depth):
    # One level is in the root, and needs no call.
    balanced = choice(EMPTY, sequence(text("("), Call("s"), text(")"), Call("s")))
    automaton = networks(s=balanced).automaton(depth)
    for length in range(9):
        for word in map("".join, product("()", repeat=length)):
            deepest = nesting(word)
            expected = deepest is not None and deepest <= depth
            assert automaton.accepts(word.encode()) == expected, word
    assert len(automaton) == depth + 1


def test_right_recursion_is_a_loop():
    found = networks(s=choice(text("x"), sequence(text("x"), Call("s"))))
    assert not found.recursive
    assert len(found.automaton(0)) == 2
    assert found.automaton(0).accepts(b"x" * 1000)


def test_left_recursion_is_a_loop():
    found = networks(
        s=choice(sequence(Call("s"), text("+"), Call("t")), Call("t")),
        t=choice(text("1"), sequence(text("("), Call("s"), text(")"))),
    )
    assert found.recursive
    automaton = found.automaton(1)
    accepted = [b"1", b"1+1+1+1+1+1+1+1+1+1", b"(1+1)+(1)"]
    assert all(map(automaton.accepts, accepted))
    assert not any(map(automaton.accepts, [b"", b"+1", b"1+", b"(1", b"1)"]))
    assert not found.automaton(0).accepts(b"(1)")


def test_left_recursion_through_others_is_refused_by_name():
    with pytest.raises(AutomatonError, match="Rule 's' begins with itself"):
        networks(
            s=choice(sequence(Call("t"), text("x")), text("y")), t=sequence(Call("s"), text("z"))
        )


def test_mutual_tail_calls_are_a_loop():
    found = networks(
        s=choice(EMPTY, sequence(text("a"), Call("t"))), t=sequence(text("b"), Call("s"))
    )
    assert not found.recursive
    assert found.automaton(0).accepts(b"ab" * 50)
    assert not found.automaton(0).accepts(b"aba")


def test_a_rule_called_twice_goes_back_to_where_it_was_called():
    found = networks(
        s=sequence(Call("t"), text("-"), Call("t"), text(".")), t=choice(text("a"), text("bb"))
    )
    accepted = {b"a-a.", b"a-bb.", b"bb-a.", b"bb-bb."}
    assert {w for w in map(bytes, product(b"ab-.", repeat=4)) if found.automaton(0).accepts(w)} == {
        word for word in accepted if len(word) == 4
    }
    assert all(map(found.automaton(0).accepts, accepted))


def test_even_palindromes_up_to_a_depth():
    pairs = [sequence(text(c), Call("s"), text(c)) for c in "ab"]
    automaton = networks(s=choice(EMPTY, *pairs)).automaton(2)
    for length in range(7):
        for word in map("".join, product("ab", repeat=length)):
            assert automaton.accepts(word.encode()) == (
                length % 2 == 0 and length <= 4 and word == word[::-1]
            )


def test_repeats():
    for least, most in [(0, None), (2, None), (0, 0), (0, 3), (2, 4), (3, 3)]:
        automaton = networks(s=Repeat(text("ab"), least, most)).automaton(0)
        for count in range(7):
            expected = count >= least and (most is None or count <= most)
            assert automaton.accepts(b"ab" * count) == expected


@pytest.mark.parametrize("node", [NOTHING, Repeat(text("a"), 3, 2), sequence(text("a"), NOTHING)])
def test_what_reads_nothing_is_empty(node):
    assert networks(s=node).automaton(0).is_empty()


def test_nothing_many_times_is_nothing():
    automaton = networks(s=sequence(Repeat(EMPTY, 10**12, 10**12), text("a"))).automaton(0)
    assert automaton.accepts(b"a")


def test_characters_are_spelled_in_utf8():
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    for first, last in [
        (0, 0x10FFFF),
        (0x41, 0x500),
        (0x90, 0xFFFE),
        (0xD000, 0xF000),
        (0x10001, 0x10FFFE),
    ]:
        automaton = networks(s=Chars(((first, last),))).automaton(0)
        for point in {*edges, first, last, first + 1, last - 1, max(first - 1, 0)}:
            if point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF:
                assert automaton.accepts(chr(point).encode()) == (first <= point <= last), hex(
                    point
                )
        assert not automaton.accepts(b"\xed\xa0\x80")  # a surrogate
        assert not automaton.accepts(b"\xc0\x80")  # an overlong spelling


def test_unknown_rules_and_sizes():
    with pytest.raises(ConstraintError, match="'t', which is not there"):
        networks(s=Call("t"))
    with pytest.raises(AutomatonError, match="more than 40 states"):
        networks(s=Repeat(text("a"), 50, 50), max_states=10)
    found = networks(s=choice(text("a"), sequence(text("("), Call("s"), text(")"))), max_states=10)
    with pytest.raises(AutomatonError, match="more than 10 states"):
        found.automaton(9)
    with pytest.raises(AutomatonError, match="more than 160 places"):
        networks(s=Repeat(text("a"), 0, 10_000), max_states=10)


def test_a_rule_that_only_calls_itself_reads_nothing():
    assert networks(s=Call("s")).automaton(0).is_empty()


def test_what_may_be_left_out_and_comes_again():
    found = networks(s=sequence(optional(sequence(text("["), Call("s"), text("]"))), text(".")))
    automaton = found.automaton(2)
    assert [automaton.accepts(w) for w in (b".", b"[.].", b"[[.].].", b"[[[.].].].")] == [
        True
    ] * 3 + [False]
