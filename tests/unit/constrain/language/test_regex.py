import re
from random import Random

import pytest
from helpers.cases import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.syntax import Grammar
from vllm_diffusion.errors import ConstraintError

ALPHABET = "abcdxyz01_- .\n@é€😀"


def automaton(expression, **options):
    grammar = Grammar({"regex": regex(expression, **options)}, "regex")
    return Networks(grammar, max_states=10_000).automaton(0)


EXPRESSIONS = [
    *("", "a", "yes|no", "(ab|a)(c|bcd)(d*)", "[a-c]{2,4}", "a{3}", "a{2,}", "(a|b)*a(a|b){3}"),
    *("é+|.*x", "[^ab]", "[^é-€]+", ".", "..", "(?s).", "(?:a?b?)*", "(a*)*"),
    *("[a-z]+@x(é|.)", r"\.\n\x41?", "a*?b+?", "(?P<name>a)b", "[]a]", r"[\^\-a]", "|a", "(|a)b"),
    *("^ab$", "^a|b$", "^(a|b)$", "(a{0,2}){2}", "[😀-😂a]+", "a{0}b"),
]


@for_each(expression=EXPRESSIONS)
def test_accepts_what_python_matches(expression):
    found, rng = automaton(expression), Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 7)))
        assert found.accepts(text.encode()) == bool(re.fullmatch(expression, text)), text


@for_each(expression=["b", "^a", "a$", "^a$", "^a|b$", "a.c", "", "^", "(a|b)"])
def test_a_search_matches_anywhere(expression):
    found, rng = automaton(expression, search=True), Random(0)
    for _ in range(1000):
        text = "".join(rng.choices("abc", k=rng.randint(0, 6)))
        assert found.accepts(text.encode()) == bool(re.search(expression, text)), text


@for_each(
    expression=[r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[^\d]", r"[^\W]", r"[\s\w]", r"[^\s\D]"]
)
def test_categories_are_what_every_dialect_agrees_on(expression):
    found = automaton(expression)
    points = [*range(0x400), 0x0660, 0x2028, 0x4E00, 0xFF11, 0x10FFFF]
    for point in points:
        character = chr(point)
        both = bool(re.fullmatch(expression, character)) and bool(
            re.fullmatch(expression, character, re.ASCII)
        )
        assert found.accepts(character.encode()) == both, hex(point)


nested = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", ".", "é", "\\n"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "?", "+", "{2}", "{1,2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(nested, st.lists(st.text("abé\n", max_size=6), min_size=5, max_size=20))
def test_random_expressions(expression, texts):
    found = automaton(expression)
    for text in texts:
        assert found.accepts(text.encode()) == bool(re.fullmatch(expression, text))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(?=a)b", "lookaround"),
        ("a(?!b)", "lookaround"),
        (r"(a)\1", "a reference to a group"),
        (r"a\b", "an anchor inside"),
        ("(^a|b)c", "an anchor inside"),
        ("(?i)a", "the flags i, m and L"),
        ("(?i:a)", "flags inside a group"),
        ("a*+", "possessive"),
        ("(?>a)", "atomic"),
        ("(", "is not a regular expression"),
        ("a{2,1}", "is not a regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(expression, message):
    with pytest.raises(ConstraintError, match=re.escape(message)):
        regex(expression)
