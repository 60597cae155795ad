"""Bad words against a search by hand, at canvas borders too, and the repair of what is left."""

from __future__ import annotations

import random

import torch
from helpers.cases import for_each

from vllm_diffusion.constrain.rewrite import BadWords
from vllm_diffusion.constrain.words import (
    UNKNOWN,
    forbidden_ids,
    output_before,
    repaired,
    word_ends,
    word_table,
)

VOCAB, LENGTH, BATCH = 5, 12, 4


def random_case(
    seed: int,
) -> tuple[list[list[list[int]]], list[list[int]], list[int], list[list[int]]]:
    """Words, texts (prompt and output), prompt lengths, canvases."""
    dice = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [dice.randrange(VOCAB) for _ in range(count)]

    words = [[tokens(dice.randint(1, 4)) for _ in range(dice.randint(0, 3))] for _ in range(BATCH)]
    words[0] = [tokens(2)]
    texts = [tokens(dice.randint(1, 7)) for _ in range(BATCH)]
    prompts = [dice.randint(1, len(text)) for text in texts]
    return words, texts, prompts, [tokens(LENGTH) for _ in range(BATCH)]


def stacked(words, texts, prompts):
    width = max(len(text) for text in texts)
    padded = torch.tensor([[*text, *[3] * (width - len(text))] for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    rest, last = word_table(words, padded.device)
    before = output_before(padded, lengths, torch.tensor(prompts), rest.shape[2])
    return BadWords(rest=rest, last=last, before=before)


def ending(word: list[int], output: list[int], at: int) -> bool:
    """Whether the word ends at index ``at`` of the output."""
    return at + 1 >= len(word) and output[at + 1 - len(word) : at + 1] == word


@for_each(seed=range(40))
def test_words_are_found_where_a_search_by_hand_finds_them(seed: int) -> None:
    words, texts, prompts, canvases = random_case(seed)
    found = word_ends(stacked(words, texts, prompts), torch.tensor(canvases))
    for row in range(BATCH):
        before = texts[row][prompts[row] :]
        output = before + canvases[row]
        for at in range(LENGTH):
            expected = any(ending(word, output, len(before) + at) for word in words[row])
            assert bool(found[row, at]) == expected


@for_each(seed=range(40))
def test_forbidden_are_the_last_tokens_of_words_whose_rest_stands_there(seed: int) -> None:
    words, texts, prompts, canvases = random_case(seed)
    forbidden = forbidden_ids(stacked(words, texts, prompts), torch.tensor(canvases))
    for row in range(BATCH):
        before = texts[row][prompts[row] :]
        for at in range(LENGTH):
            expected = {
                word[-1]
                for word in words[row]
                if ending(word, [*before, *canvases[row][:at], word[-1]], len(before) + at)
            }
            assert set(forbidden[row, at].tolist()) - {-1} == expected


def test_an_unknown_canvas_forbids_single_tokens_and_what_the_text_begins() -> None:
    words = stacked([[[4], [1, 2], [1, 2, 3]]], [[0, 1]], [1])
    unknown = torch.full((1, 3), UNKNOWN)
    found = [set(row) - {-1} for row in forbidden_ids(words, unknown)[0].tolist()]
    assert found == [{4, 2}, {4}, {4}]


def test_the_prompt_begins_no_word() -> None:
    words = stacked([[[1, 2]]], [[0, 1]], [2])
    assert not bool(word_ends(words, torch.tensor([[2, 2]])).any())


@for_each(seed=range(40))
def test_a_repaired_canvas_holds_no_word(seed: int) -> None:
    words, texts, prompts, canvases = random_case(seed)
    batch, tokens = stacked(words, texts, prompts), torch.tensor(canvases)
    generator = torch.Generator().manual_seed(seed)
    ranked = torch.rand(BATCH, LENGTH, VOCAB, generator=generator).argsort(dim=-1)
    result = repaired(batch, tokens, ranked[..., : batch.last.shape[1] + 1])
    assert not bool(word_ends(batch, result).any())
    # Up to the first word, nothing had to change.
    for row in range(BATCH):
        ends = word_ends(batch, tokens)[row].nonzero().flatten().tolist()
        first = ends[0] if ends else LENGTH
        assert result[row, :first].tolist() == canvases[row][:first]
    # One canvas alone is repaired as in the batch.
    alone = repaired(
        batch.take(slice(2, 3)), tokens[[2]], ranked[[2], :, : batch.last.shape[1] + 1]
    )
    assert torch.equal(alone[0], result[2])


def test_the_best_candidate_that_ends_no_word_is_taken() -> None:
    words = stacked([[[1, 2], [1, 3]]], [[0]], [1])
    candidates = torch.tensor([[[1, 0, 4], [2, 3, 4]]])
    assert repaired(words, torch.tensor([[1, 2]]), candidates).tolist() == [[1, 4]]


def test_a_word_stays_where_no_other_id_may_stand() -> None:
    words = stacked([[[1, 2]]], [[0]], [1])
    candidates = torch.tensor([[[1, -1], [2, -1]]])
    assert repaired(words, torch.tensor([[1, 2]]), candidates).tolist() == [[1, 2]]
