"""Texts that several expressions ask for: the rules read what Python's re does, one by one."""

from __future__ import annotations

import re
from itertools import product

import pytest
from helpers.cases import for_each

from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.json_text import INTEGER
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.regular import Multiples, intersect
from vllm_diffusion.constrain.language.syntax import Grammar
from vllm_diffusion.errors import ConstraintError


def automaton(wanted, unwanted=(), **counts):
    rules = intersect(wanted, unwanted, prefix="x", **counts)
    return Networks(Grammar(rules, next(iter(rules))), max_states=2000).automaton(0)


@pytest.mark.parametrize(
    ("wanted", "unwanted", "least", "most"),
    [
        (["a*b?c*", "(ab|c)*"], [], 0, None),
        (["[abc]*"], ["a.*", ".*cc.*"], 1, 4),
        (["(a|b)*", ".*b.."], ["b*"], 0, 5),
        ([], ["a+", "ab{2,3}"], 0, 3),
    ],
)
def test_together(wanted, unwanted, least, most):
    dfa = automaton(map(regex, wanted), map(regex, unwanted), least=least, most=most)
    for length in range(6):
        for letters in product("abc", repeat=length):
            word = "".join(letters)
            right = (
                all(re.fullmatch(each, word) for each in wanted)
                and not any(re.fullmatch(each, word) for each in unwanted)
                and least <= length <= (length if most is None else most)
            )
            assert dfa.accepts(word.encode()) == right, word


@for_each(step=[2, 7, 12, 100])
def test_multiples(step):
    dfa = automaton([INTEGER, Multiples(step)])
    for number in range(-300, 300):
        assert dfa.accepts(str(number).encode()) == (number % step == 0), number


def test_too_many_states_are_refused():
    with pytest.raises(ConstraintError, match="too many states"):
        automaton([regex("(abc|d)*")], least=0, most=5000)
