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

Where noise is masks, tokens that are revealed stay, and nothing may complete a word later:

1. In every step, at every position, the tokens are forbidden that would complete a word with those
   that are known around it (``completing_ids``).
2. Positions that are revealed in the same step can still complete one together. Then the last of
   them stays a mask for another step, which sees the others (``held_back``). The first position of
   a step is never held back, so every step reveals some.
3. The last step reveals everything, and is repaired as above. Positions that were known before it
   stay, so they count on both sides of a word.

As in vLLM, words are searched in the output alone: a word may begin in an earlier canvas, not in
the prompt. Pins win over bad words, and so do allowed ids that leave no other token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

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


def completing_ids(words: BadWords, tokens: Tensor) -> Tensor:
    """The ids that would complete a word with the tokens on both sides.

    Args:
        words: of B canvases.
        tokens: [B, L] int64, the known tokens of the canvases; below -1 where unknown.

    Returns:
        [B, L, W * (P + 1)] int64, -1 where a word would not be complete.
    """
    reach = words.rest.shape[2]
    text = functional.pad(torch.cat([words.before, tokens], dim=1), (0, reach), value=UNKNOWN)
    return _completing(words, text.unfold(1, 2 * reach + 1, 1)).flatten(2)


def held_back(words: BadWords, tokens: Tensor, accept: Tensor) -> Tensor:
    """[B, L] bool, positions to be revealed later, for no word to be complete.

    Of each word that several positions complete together, the last of these. A position that
    completes a word alone had no other token left.

    Args:
        words: of B canvases.
        tokens: [B, L] int64, the canvases after this step; below -1 where unknown.
        accept: [B, L] bool, positions that this step reveals.
    """
    (num, length), reach = tokens.shape, words.rest.shape[2]
    whole = _whole(words)[:, None]  # [B, 1, W, P + 1]
    text = torch.cat([words.before, tokens], dim=1).unfold(1, reach + 1, 1)[:, :, None]
    revealed = functional.pad(accept, (reach, 0)).unfold(1, reach + 1, 1)[:, :, None]
    complete = ((text == whole) | (whole < 0)).all(dim=-1) & (whole[..., -1] >= 0)
    mine = revealed & (whole >= 0) & complete[..., None]  # [B, L, W, P + 1]
    several = mine.sum(dim=-1) > 1
    place = torch.arange(reach + 1, device=tokens.device)
    last = torch.where(mine, place, 0).amax(dim=-1)  # [B, L, W], in the window
    at = torch.arange(length, device=tokens.device)[:, None] + last
    held = torch.zeros(num, length + reach, dtype=torch.int64, device=tokens.device)
    held.scatter_add_(1, at.flatten(1), several.long().flatten(1))
    return held[:, reach:] > 0


def word_ends(words: BadWords, tokens: Tensor) -> Tensor:
    """[B, L] bool, the positions at which a word ends in ``tokens`` [B, L] int64."""
    return (forbidden_ids(words, tokens) == tokens[..., None]).any(dim=-1)


def repaired(
    words: BadWords, tokens: Tensor, candidates: Tensor, stays: Tensor | None = None
) -> Tensor:
    """The tokens with every word broken, from left to right.

    Args:
        words: of B canvases.
        tokens: [B, L] int64.
        candidates: [B, L, K] int64, ids that may stand there instead, best first, -1 pads. With
            more candidates than ways to complete a word, W (P + 1) or W if nothing stays, one is
            always left.
        stays: [B, L] bool, positions that keep their token; None for none.

    Returns:
        [B, L] int64; a word stays where its row has no other candidate.
    """
    reach = words.rest.shape[2]
    stays = torch.zeros_like(tokens, dtype=torch.bool) if stays is None else stays
    text = torch.cat([words.before, tokens.masked_fill(~stays, UNKNOWN)], dim=1)
    text = functional.pad(text, (0, reach), value=UNKNOWN)
    for column in range(tokens.shape[1]):
        around = text[:, None, column : column + 2 * reach + 1]
        forbidden = _completing(words, around)[:, 0].flatten(1)
        token, options = tokens[:, column], candidates[:, column]
        usable = (options[..., None] != forbidden[:, None]).all(dim=-1) & (options >= 0)
        choice = options.gather(1, usable.int().argmax(dim=1, keepdim=True))[:, 0]
        broken = (forbidden == token[:, None]).any(dim=-1) & usable.any(dim=-1)
        text[:, reach + column] = torch.where(broken & ~stays[:, column], choice, token)
    return text[:, reach : reach + tokens.shape[1]]


def _ending_behind(words: BadWords, windows: Tensor) -> Tensor:
    """[B, M, P] tokens before M positions -> [B, M, W] ids that would end a word, -1 if none."""
    rest = words.rest[:, None]
    complete = ((windows[:, :, None] == rest) | (rest < 0)).all(dim=-1)
    return torch.where(complete, words.last[:, None], -1)


def _completing(words: BadWords, around: Tensor) -> Tensor:
    """The ids that complete a word in the middle of windows.

    Args:
        words: of B canvases.
        around: [B, M, 2 P + 1], tokens around M positions.

    Returns:
        [B, M, W, P + 1], by the place in the word, right-aligned; -1 if none.
    """
    reach = words.rest.shape[2]
    whole = _whole(words)[:, None, :, None]  # [B, 1, W, 1, P + 1]
    # A word whose place k stands in the middle begins (its pads counted) P - k tokens in.
    windows = around.unfold(2, reach + 1, 1).flip(2)[:, :, None]  # [B, M, 1, P + 1, P + 1]
    here = torch.eye(reach + 1, dtype=torch.bool, device=around.device)
    complete = ((windows == whole) | (whole < 0) | here).all(dim=-1)
    return torch.where(complete, whole[:, :, :, 0], -1)


def _whole(words: BadWords) -> Tensor:
    """[B, W, P + 1] int64, the words, right-aligned; -1 pads."""
    return torch.cat([words.rest, words.last[..., None]], dim=2)


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
