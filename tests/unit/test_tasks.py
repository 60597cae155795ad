"""Generators make what they say, verifiers accept that and nothing else."""

import json
import random
from itertools import product

import pytest
from helpers.cases import for_each
from hypothesis import given
from hypothesis import strategies as st

from vllm_diffusion.testing.tasks import (
    COLOURS,
    NAMES,
    TASKS,
    UNITS,
    Item,
    held_out_items,
    make_item,
    solved,
)


def items_of(task, count=20):
    rng = random.Random(task)
    return [make_item(task, rng, size) for size in TASKS[task].sizes for _ in range(count)]


@for_each(task=TASKS)
def test_the_given_answer_is_right_at_every_size(task):
    for item in items_of(task):
        assert solved(item, item.answer), item
        assert solved(item, f"\n {item.answer} "), "blanks around it do not matter"


@given(task=st.sampled_from(list(TASKS)), seed=st.integers(0, 10**6), data=st.data())
def test_an_answer_with_one_letter_changed_is_wrong(task, seed, data):
    rng = random.Random(seed)
    item = make_item(task, rng, rng.choice(TASKS[task].sizes))
    place = data.draw(st.integers(0, len(item.answer) - 1))
    letter = "7" if item.answer[place] != "7" else "8"
    assert not solved(item, item.answer[:place] + letter + item.answer[place + 1 :])


@pytest.mark.parametrize("task", TASKS)
@for_each(text=["", "no", "[]", "null", "[" * 100_000])
def test_other_texts_are_wrong(task, text):
    assert not solved(items_of(task, 1)[0], text)


@for_each(task=TASKS)
def test_easy_and_hard_sizes_are_sizes_and_do_not_meet(task):
    made = TASKS[task]
    assert set(made.easy) < set(made.sizes)
    assert set(made.hard) < set(made.sizes)
    assert made.easy[-1] < made.hard[0]


def test_a_size_that_a_task_does_not_have_is_named():
    with pytest.raises(ValueError, match="size of sudoku from 4 to 10, but got 16"):
        make_item("sudoku", random.Random(0), 16)


def test_json_may_be_written_in_any_style():
    for item in items_of("json", 3):
        assert solved(item, json.dumps(json.loads(item.answer), indent=2))
        assert len(json.loads(item.answer)) == item.size


def test_sudokus_have_as_many_gaps_as_their_size_and_one_solution():
    cells = ["".join(row) for row in product("1234", repeat=4) if len(set(row)) == 4]
    for item in items_of("sudoku", 2):
        rows = item.prompt.removeprefix("sudoku ").split("/")
        assert "".join(rows).count("0") == item.size
        fitting = [
            [cell for cell in cells if all(g in ("0", c) for g, c in zip(row, cell, strict=True))]
            for row in rows
        ]
        grids = ["".join(four) for four in product(*fitting)]
        solutions = [g for g in grids if all(len({g[cell] for cell in u}) == 4 for u in UNITS)]
        assert solutions == [item.answer.replace("/", "")]


def test_a_chain_is_the_running_sum():
    for made in items_of("chain", 3):
        terms = made.prompt.split()[1:]
        sums = [sum(int(term[1]) for term in terms[: n + 1]) % 10 for n in range(made.size)]
        expected = [f"{term}={total}" for term, total in zip(terms, sums, strict=True)]
        assert made.answer.split() == expected


def test_joint_takes_any_one_colour_and_no_mixture():
    item = Item("joint", 2, "paint cat dog", "red cat, red dog")
    assert all(solved(item, f"{colour} cat, {colour} dog") for colour in COLOURS)
    assert not solved(item, "red cat, blue dog")
    assert not solved(item, "red dog, red cat")


def test_edit_changes_every_place_of_the_word_and_nothing_else():
    for item in items_of("edit"):
        change, text = item.prompt.split(": ", 1)
        old, new = change.split(" becomes ")
        assert old in text
        assert item.answer.split() == [
            word.replace(old, new) if word.strip(",.") == old else word for word in text.split()
        ]


def test_count_is_as_long_as_its_size():
    for item in items_of("count", 2):
        pairs = [term.split("/") for term in item.answer.split()]
        numbers = [int(number) for number, _ in pairs]
        assert len(numbers) == item.size
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert {int(last) for _, last in pairs} == {numbers[-1]}
        assert item.prompt == f"count {numbers[0]} to {numbers[-1]}"


def test_invented_names_come_with_three_people():
    def invented(size):
        rng = random.Random(1)
        answers = [json.loads(make_item("json", rng, size).answer) for _ in range(20)]
        return [sum(person["name"] not in NAMES for person in people) for people in answers]

    assert set(invented(2)) == {0}
    assert set(invented(3)) == {1}
    assert set(invented(4)) == {2}


@for_each(task=TASKS)
def test_held_out_items_repeat_with_the_seed_differ_from_each_other_and_are_held_out(task):
    sizes = TASKS[task].sizes
    items = list(held_out_items(task, 30, seed=3, sizes=sizes))
    assert items == list(held_out_items(task, 30, seed=3, sizes=sizes))
    assert items != list(held_out_items(task, 30, seed=4, sizes=sizes))
    assert len({item.prompt for item in items}) == 30
    assert all(item.held_out for item in items)
    assert [item.size for item in items] == [sizes[n % len(sizes)] for n in range(30)]


def test_about_one_prompt_in_sixteen_is_held_out():
    items = {item.prompt: item for task in TASKS for item in items_of(task, 60)}
    share = sum(item.held_out for item in items.values()) / len(items)
    assert 1 / 24 < share < 1 / 11


def test_a_task_that_runs_out_of_held_out_items_says_how_many_it_had():
    few = list(held_out_items("count", 12, seed=0, sizes=[4, 5]))
    assert len({item.prompt for item in few}) == 12
    with pytest.raises(ValueError, match=r"count has \d+ held-out items of these sizes, not 100"):
        list(held_out_items("count", 100, seed=0, sizes=[4, 5]))
