"""A byte-level BPE tokenizer of any vocabulary size, trained on a few lines of text.

Takes a vocabulary size, the lines and the special tokens of a family. Gives a tokenizer that reads
every text. The same arguments give the same tokenizer everywhere.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BYTES = 256


def byte_tokenizer(
    vocab: int, corpus: Iterable[str], *, special_tokens: Sequence[str], bos: str | None
) -> Tokenizer:
    """Train a tokenizer with exactly `vocab` ids; digits are always separate tokens.

    Args:
        vocab: ids; at least the special tokens and one for every byte.
        corpus: lines to merge pairs of.
        special_tokens: the first ids, in this order.
        bos: the one of them that every text begins with; None where a text begins with itself.

    Raises:
        ValueError: the vocabulary is too small.
    """
    least = len(special_tokens) + BYTES
    if vocab < least:
        raise ValueError(
            f"Expected a vocabulary of at least {least} ({len(special_tokens)} special tokens "
            f"and {BYTES} bytes), but got {vocab}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer = _filled_up(tokenizer, vocab)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, special_tokens.index(bos))],
        )
    return tokenizer


def _filled_up(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """Give every id up to `vocab` a token: an id without one would crash a detokenizer."""
    state = json.loads(tokenizer.to_str())
    words: dict[str, int] = state["model"]["vocab"]
    for index in range(len(words), vocab):
        words[f"<unused{index}>"] = index
    return Tokenizer.from_str(json.dumps(state))
