"""A tokenizer that is given labels has each as one token, and is otherwise the one it was."""

import string

import pytest
from tokenizers import Tokenizer

from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import build_tokenizer
from vllm_diffusion.testing.labels import LABELS, with_labels

TEXT = "Paris, a city on the river Seine: yesterday we said yes or no, 17 times."


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    build_tokenizer(400).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    return folder


def tokenizer_of(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_every_label_is_one_token_and_no_id_is_new(source, tmp_path):
    assert len(pieces(tokenizer_of(source), "yes")) > 1
    copy = with_labels(source, tmp_path / "copy")
    tokenizer = tokenizer_of(copy)
    for label in LABELS:
        assert pieces(tokenizer, label) == [label]
    assert tokenizer.get_vocab_size() == tokenizer_of(source).get_vocab_size()
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert (copy / "config.json").exists()


def test_labels_may_be_kept_apart_from_what_stands_before_them(source, tmp_path):
    words = (*LABELS, *string.ascii_uppercase, *string.digits)
    tokenizer = tokenizer_of(with_labels(source, tmp_path / "copy", words, apart=True))
    for label in words:
        assert pieces(tokenizer, f"7: {label}\n7: {label}")[-1] == label
        assert pieces(tokenizer, f"7: {label}")[:-1] == pieces(tokenizer, "7: ")
