"""The tokens of a tokenizer as a trie of bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_diffusion.constrain.language.syntax import MARK, mark

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    """What every token writes. V tokens, M trie nodes, level by level; node 0 is the root."""

    node: NDArray[np.int32]  # [V], where a token ends; 0: it writes nothing that can be read
    parent: NDArray[np.int32]  # [M], -1 for the root
    byte: NDArray[np.uint8]  # [M], the last byte of a node's text
    levels: NDArray[np.int64]  # [D + 1], first node of every level, and M
    fingerprint: str  # equal for equal vocabularies

    def __len__(self) -> int:
        return len(self.node)

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return len(self.levels) - 2

    def text(self, token: int) -> bytes:
        """The bytes that a token writes."""
        node, reverse = int(self.node[token]), bytearray()
        while node:
            reverse.append(self.byte[node])
            node = int(self.parent[node])
        return bytes(reversed(reverse))

    def without(self, tokens: Collection[int]) -> Vocabulary:
        """The same, where some tokens write nothing, so that no text needs them."""
        if not tokens:
            return self
        node = self.node.copy()
        node[list(tokens)] = 0
        return replace(self, node=node, fingerprint=f"{self.fingerprint}-{sorted(tokens)}")

    @classmethod
    def of(cls, tokens: Sequence[bytes], special: Collection[int] = ()) -> Vocabulary:
        """From the bytes of every token id; special ones are read by their id alone, see `mark`."""
        # No text has this byte, and spelled byte by byte a mark would not be its token.
        texts = [b"" if MARK in text else text for text in tokens]
        for token in special:
            texts[token] = mark(token)
        data = np.frombuffer(b"".join(texts), dtype=np.uint8)
        length = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        first = np.cumsum(length) - length
        node = np.zeros(len(texts), dtype=np.int64)
        parents, byte, levels = [np.array([-1])], [np.zeros(1, dtype=np.uint8)], [0, 1]
        longer = np.flatnonzero(length)
        for depth in range(int(length.max(initial=0))):
            steps = node[longer] * 256 + data[first[longer] + depth]
            unique, inverse = np.unique(steps, return_inverse=True)
            parents.append(unique // 256)
            byte.append((unique % 256).astype(np.uint8))
            node[longer] = levels[-1] + inverse
            levels.append(levels[-1] + len(unique))
            longer = longer[length[longer] > depth + 1]
        digest = hashlib.blake2b(length.tobytes(), digest_size=16)
        digest.update(data.tobytes())
        return cls(
            node=node.astype(np.int32),
            parent=np.concatenate(parents).astype(np.int32),
            byte=np.concatenate(byte),
            levels=np.array(levels),
            fingerprint=digest.hexdigest(),
        )


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """The vocabulary of a Transformers tokenizer.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase``.
        vocab_size: ids of the model's head, which may be more than the tokenizer has.
    """
    from xgrammar import TokenizerInfo

    told = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    added = tokenizer.added_tokens_decoder
    special = {*told.special_token_ids, *told.stop_token_ids, *tokenizer.all_special_ids}
    special |= {token for token, entry in added.items() if entry.special}
    return Vocabulary.of(told.decoded_vocab, {token for token in special if token < vocab_size})
