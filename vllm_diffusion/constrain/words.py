"""Bad words: token sequences that must not stand in the output, on a canvas that settles anywhere.

From left to right it would suffice to forbid the last token of a word behind its other tokens. On a
canvas these are not decided yet, so the same mask is applied to the best guess of them, and what it
misses is caught at the end:

1. In every step, the last token of a word is forbidden at position i if the tokens before i
   complete the rest of the word. Those tokens are committed text and, on the canvas, the argmax of
   the step before. Words of one token are forbidden everywhere, so for them this is all.
2. Neighbours change in the same step, so a word of several tokens can still appear in an argmax.
   Such a canvas does not count as settled: it takes another step, which sees the word and forbids
   it.
3. At the step limit a canvas must end. Its argmax is repaired from left to right: where a word
   ends, its last token becomes the row's best id that ends no word. No later replacement can
   complete a word that ends before it, so the committed canvas holds none.

As in vLLM, words are searched in the output alone: a word may begin in an earlier canvas, not in
the prompt. Pins win over bad words, and so do allowed ids that leave no other token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.transfer import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import BadWords

UNKNOWN: Final = -2
"""Stands for an unknown token; no word contains it."""


def forbidden_ids(words: BadWords, tokens: Tensor) -> Tensor:
    """The ids that would end a word, at every position of a canvas.

    Args:
        words: of B canvases.
        tokens: [B, L] int64, the assumed tokens of the canvases; below -1 where unknown.

    Returns:
        [B, L, W] int64, -1 where a word would not end.
    """
    text = torch.cat([words.before, tokens], dim=1)
    # Position i is preceded by the window that starts at i, since the text begins P before it.
    return _ending_behind(words, text.unfold(1, words.rest.shape[2], 1)[:, : tokens.shape[1]])


def word_ends(words: BadWords, tokens: Tensor) -> Tensor:
    """[B, L] bool, the positions at which a word ends in ``tokens`` [B, L] int64."""
    return (forbidden_ids(words, tokens) == tokens[..., None]).any(dim=-1)


def repaired(words: BadWords, tokens: Tensor, candidates: Tensor) -> Tensor:
    """The tokens with every word broken, from left to right.

    Args:
        words: of B canvases.
        tokens: [B, L] int64.
        candidates: [B, L, K] int64, ids that may stand there instead, best first, -1 pads. With
            more candidates than words one is always left.

    Returns:
        [B, L] int64; a word stays where its row has no other candidate.
    """
    reach = words.rest.shape[2]
    text = torch.cat([words.before, tokens], dim=1)
    for column in range(tokens.shape[1]):
        forbidden = _ending_behind(words, text[:, None, column : column + reach])[:, 0]
        token, options = text[:, reach + column], candidates[:, column]
        usable = (options[..., None] != forbidden[:, None]).all(dim=-1) & (options >= 0)
        choice = options.gather(1, usable.int().argmax(dim=1, keepdim=True))[:, 0]
        broken = (forbidden == token[:, None]).any(dim=-1) & usable.any(dim=-1)
        text[:, reach + column] = torch.where(broken, choice, token)
    return text[:, reach:]


def _ending_behind(words: BadWords, windows: Tensor) -> Tensor:
    """[B, M, P] tokens before M positions -> [B, M, W] ids that would end a word, -1 if none."""
    rest = words.rest[:, None]
    complete = ((windows[:, :, None] == rest) | (rest < 0)).all(dim=-1)
    return torch.where(complete, words.last[:, None], -1)


def word_table(
    words: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """``BadWords.rest`` [B, W, P] and ``BadWords.last`` [B, W] of a batch's words.

    Args:
        words: for every canvas, its words as token ids; no word is empty, one canvas has some.
        device: where the batch runs.
    """
    reach = max(1, *(len(word) - 1 for mine in words for word in mine))
    num_words = max(len(mine) for mine in words)
    rest = torch.full((len(words), num_words, reach), -1, dtype=torch.int64)
    last = torch.full((len(words), num_words), -1, dtype=torch.int64)
    for canvas, mine in enumerate(words):
        for index, word in enumerate(mine):
            last[canvas, index] = word[-1]
            if len(word) > 1:
                rest[canvas, index, reach - len(word) + 1 :] = torch.tensor(word[:-1])
    return upload(rest, device), upload(last, device)


def output_before(text: Tensor, length: Tensor, prompt_length: Tensor, reach: int) -> Tensor:
    """``BadWords.before``: the last ``reach`` tokens of output before every canvas.

    Args:
        text: [B, N] int64, prompt and committed tokens, N at least 1.
        length: [B] int64, tokens of text.
        prompt_length: [B] int64, how many of them are the prompt.
        reach: P.

    Returns:
        [B, P] int64, UNKNOWN where the output is shorter.
    """
    position = length[:, None] + torch.arange(-reach, 0, device=text.device)
    before = text.gather(1, position.clamp(0, text.shape[1] - 1))
    return torch.where(position >= prompt_length[:, None], before, UNKNOWN)
