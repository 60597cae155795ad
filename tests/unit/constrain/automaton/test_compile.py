import json

import numpy as np
import pytest
from helpers.spelling import END, PAD, SPECIAL, VOCABULARY, Walk, accepts, spelled

from vllm_diffusion.constrain.automaton.classes import Limits
from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.vocabulary import vocabulary_of
from vllm_diffusion.constrain.language.syntax import mark
from vllm_diffusion.errors import AutomatonError, ConstraintError
from vllm_diffusion.models.diffusion_gemma.testing import tokenizer as tiny_tokenizer

ARITHMETIC = 'root ::= sum\nsum ::= sum "+" atom | atom\natom ::= [0-9]+ | "(" sum ")"'


def compiled(kind, text, **options):
    options = {"vocabulary": VOCABULARY, "end_ids": [END], **options}
    return compile_constraint(kind, text, **options)


@pytest.mark.parametrize(
    ("kind", "text", "accepted", "refused"),
    [
        (
            "choice",
            '["yes", "no", "yes, sure é"]',
            ["yes", "no", "yes, sure é"],
            ["", "ye", "yesno"],
        ),
        ("regex", "[ab]{2}", ["ab", "bb"], ["a", "abc"]),
        ("json", '{"type": "integer"}', ["-12"], ["1.5", ""]),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", ""]),
        ("grammar", ARITHMETIC, ["1+2+3", "(1+2)+3", "((4))"], ["", "+", "(1"]),
        (
            "grammar",
            r'root ::= "\x41\n" [^a-c\]]? x{2,3} [0-9]*' + '\nx ::= "" | "k" x',
            ["A\n", "A\ndkkkkk12"],
            ["A\na"],
        ),
        (
            "structural_tag",
            json.dumps(
                {
                    "type": "structural_tag",
                    "format": {
                        "type": "tag",
                        "begin": "<f>",
                        "content": {"type": "regex", "pattern": "a+"},
                        "end": "</f>",
                    },
                }
            ),
            ["<f>aa</f>"],
            ["<f></f>", "aa"],
        ),
    ],
)
def test_every_kind(kind, text, accepted, refused):
    automaton = compiled(kind, text)
    rng = np.random.default_rng(0)
    for each in accepted * 3:
        assert accepts(automaton, spelled(each, rng)), each
    for each in refused:
        assert not accepts(automaton, spelled(each, rng)), each


def test_objects_nest_as_deep_as_the_limits_let_them():
    shallow = compiled("json_object", "", limits=Limits(states=400))
    deep = compiled("json_object", "", limits=Limits(states=4000))
    assert 1 <= shallow.depth < deep.depth <= 8
    assert shallow.num_states <= 401
    assert deep.num_states <= 4001
    walk = Walk(deep, seed=0)
    assert all(isinstance(json.loads(walk.text(free)), dict) for free in range(60))
    assert compiled("json", '{"type": "integer"}').depth is None


@pytest.mark.parametrize("limits", [{"deep_states": 400}, {"deep_edges": 4000}])
def test_nesting_has_limits_of_its_own(limits):
    most = compiled("json_object", "", limits=Limits())
    some = compiled("json_object", "", limits=Limits(**limits))
    assert some.depth < most.depth
    least = compiled("json_object", "", limits=Limits(deep_states=1))
    assert least.depth == 0
    assert least.num_states > 1


def test_a_recursive_constraint_is_not_followed_deeper_than_asked():
    assert compiled("grammar", ARITHMETIC, limits=Limits(depth=2)).depth == 2


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("choice", "yes", "JSON list of strings"),
        ("choice", "[1]", "JSON list of strings"),
        ("choice", "[]", "Nothing satisfies"),
        ("yaml", "", "one of json, json_object, regex"),
        ("grammar", "root ::= (", "not a grammar"),
        ("grammar", 'root ::= a\na ::= b "x"\nb ::= a "y"', "begins with itself"),
        ("structural_tag", "{}", "not a structural tag"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "nested too deep|not a regular expression"),
    ],
)
def test_one_clear_error(kind, text, message):
    with pytest.raises(ConstraintError, match=message):
        compiled(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("regex", "a{50}"),
        ("regex", "a{500}"),
        ("regex", "(a{1000}){1000}"),
        ("regex", "((a{0,99}){0,99}){0,99}"),
        ("json", '{"type": "string", "maxLength": 1e9}'),
        ("json", '{"type": "object", "maxProperties": 1e9, "minProperties": 1}'),
        ("json", '{"type": "array", "minItems": 1e9}'),
    ],
)
def test_what_is_too_large_says_so_at_once(kind, text):
    with pytest.raises(AutomatonError, match="more than"):
        compiled(kind, text, limits=Limits(states=20))


def test_a_tokenizer_with_marked_spaces_and_bytes_to_fall_back_on():
    """The kind that Gemma has: a space is a mark, bytes are tokens such as <0x0A>."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "a", "\u2581a", "\u2581\u2581", "\n", "\u00e9", "<unused0>"]
    model = models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True)
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    vocabulary = vocabulary_of(tokenizer, 300)
    assert [vocabulary.text(token) for token in range(3)] == [mark(token) for token in range(3)]
    # Byte 255, of which no character has any, is what special tokens are marked with.
    assert [vocabulary.text(3 + byte) for byte in range(255)] == [bytes([b]) for b in range(255)]
    found = [vocabulary.text(token) for token in range(259, 266)]
    assert found == [b" ", b"a", b" a", b"  ", b"\n", "\u00e9".encode(), b"<unused0>"]


def test_a_tokenizer_of_the_library():
    from transformers import PreTrainedTokenizerFast

    inner = tiny_tokenizer.build_tokenizer(512)
    vocabulary = vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=inner), 520)
    assert len(vocabulary) == 520
    for token in range(len(tiny_tokenizer.SPECIAL_TOKENS)):
        assert vocabulary.text(token) == mark(token)
    for text in ('{"name": "Alice"}', " the é 😀\n\t"):
        ids = inner.encode(text, add_special_tokens=False).ids
        assert b"".join(map(vocabulary.text, ids)).decode() == text
    assert vocabulary.text(515) == mark(515)
    schema = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}})
    automaton = compiled("json", schema, vocabulary=vocabulary, end_ids=[1, 5])
    assert accepts(automaton, inner.encode('{"name": "Alice"}', add_special_tokens=False).ids)
    assert isinstance(json.loads(Walk(automaton, 0, vocabulary).text(20)), dict)


def test_special_tokens_are_read_by_id_and_never_as_text():
    special = f"<special{SPECIAL}>"
    grammar = f'root ::= "a" Token({SPECIAL}) [^x]*'
    automaton = compile_constraint("grammar", grammar, vocabulary=VOCABULARY, end_ids=[END])
    rng = np.random.default_rng(0)
    one, other = spelled("a", rng), spelled("b", rng)
    assert accepts(automaton, [*one, SPECIAL, *other])
    assert not accepts(automaton, [*one, SPECIAL, SPECIAL])
    assert not accepts(automaton, [*one, PAD, *other])
    assert not accepts(automaton, spelled(f"a{special}b", rng))
    # Nor byte by byte, by tokens of single bytes.
    single = {VOCABULARY.text(token): token for token in range(SPECIAL + 1, SPECIAL + 257)}
    assert None in {single.get(bytes([byte])) for byte in mark(SPECIAL)}
