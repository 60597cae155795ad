"""Training the tiny SDAR and LLaDA: what a packed pass computes is what decoding computes."""

import argparse
import csv
import importlib
import json
import random
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.testing import tasks

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-sdar"
FAMILIES = ("sdar", "llada")


@pytest.fixture(scope="module")
def parts():
    """The folder's modules, which import each other by their plain names."""
    names = ("noising", "inherit", "released", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(parts):
    return parts.released.build_text()


def clean_prefix(rows, row, item, block):
    """Tokens of an item before a block, and their visibility to each other."""
    before = (rows.item[row] == item) & (rows.view[row] == 0) & (rows.block[row] < block)
    return rows.tokens[row][before], rows.block[row][before]


def logits_of(model, rows):
    return model(
        input_ids=rows.tokens, attention_mask=rows.visibility(), position_ids=rows.position
    ).logits


def copies(rows):
    """(row, item, block, mask) of every block of every masked copy."""
    for row in range(rows.item.shape[0]):
        keys = torch.stack((rows.item[row], rows.view[row], rows.block[row]), 1)
        for item, view, block in keys[rows.view[row] > 0].unique(dim=0).tolist():
            yield row, item, block, (keys == torch.tensor([item, view, block])).all(1)


@torch.no_grad()
def test_a_masked_block_of_sdar_is_computed_as_behind_its_clean_beginning(parts, text):
    model = parts.released.build_model("sdar", text, seed=3).eval()
    rows = parts.train.batch("sdar", text, "5", 2)
    packed = logits_of(model, rows)
    seen = list(copies(rows))
    for row, item, block, mask in seen[::7]:
        before, blocks = clean_prefix(rows, row, item, block)
        blocks = torch.cat((blocks, torch.full((parts.noising.BLOCK,), block)))
        tokens = torch.cat((before, rows.tokens[row][mask]))[None]
        assert tokens.shape[1] % parts.noising.BLOCK == 0
        visible = (blocks[None, :] <= blocks[:, None])[None, None]
        alone = model(input_ids=tokens, attention_mask=visible).logits[0]
        torch.testing.assert_close(
            packed[row][mask], alone[-parts.noising.BLOCK :], atol=2e-5, rtol=0
        )
    assert len({block for *_, block, _ in seen}) > 5


@torch.no_grad()
def test_an_item_of_llada_is_computed_as_alone_and_sees_all_of_itself(parts, text):
    model = parts.released.build_model("llada", text, seed=3).eval()
    rows = parts.train.batch("llada", text, "5", 2)
    packed = logits_of(model, rows)
    for row, item in ((0, rows.item[0, 0]), (1, rows.item[1].max())):
        mine = rows.item[row] == item
        tokens = rows.tokens[row][mine][None]
        everything = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
        alone = model(input_ids=tokens, attention_mask=everything).logits[0]
        torch.testing.assert_close(packed[row][mine], alone, atol=2e-5, rtol=0)
        last = tokens.clone()
        last[0, -1] = 100
        moved = model(input_ids=last, attention_mask=everything).logits[0]
        assert (moved[0] - alone[0]).abs().max() > 1e-4


@for_each(seed=["1", "2"])
@torch.no_grad()
def test_a_token_changes_no_earlier_block_of_sdar(parts, text, seed):
    model = parts.released.build_model("sdar", text, seed=3).eval()
    rows = parts.train.batch("sdar", text, seed, 1)
    before = logits_of(model, rows)[0]
    clean = (rows.view[0] == 0) & (rows.item[0] == rows.item[0, 0])
    changed = int(clean.nonzero()[-parts.noising.BLOCK - 1])
    block = rows.block[0, changed]
    rows.tokens[0, changed] = (rows.tokens[0, changed] + 1) % text.mask
    moved = (logits_of(model, rows)[0] - before).abs().amax(-1) > 0
    sees_it = (rows.item[0] == rows.item[0, 0]) & (
        torch.where(rows.view[0] == 0, rows.block[0], rows.block[0] - 1) >= block
    )
    assert torch.equal(moved, sees_it)


@for_each(family=FAMILIES)
def test_masks_stand_in_answers_and_weigh_one_over_their_level(parts, text, family):
    rows = parts.train.batch(family, text, "7", 12)
    assert (rows.item >= 0).float().mean() > 0.75
    judged = rows.targets != parts.noising.IGNORED
    assert torch.equal(judged, rows.tokens == text.mask)
    assert torch.equal(judged, rows.weight > 0)
    assert rows.weight[judged].min() >= 1
    assert rows.weight[judged].max() <= 1 / parts.noising.LEAST
    # A token is masked with the chance that it weighs one over: the weights sum to their number.
    assert rows.weight.sum() == pytest.approx(rows.answers, rel=0.1)
    clean = torch.where(judged, rows.targets, rows.tokens)
    filled = 0
    for row in range(12):
        for item in rows.item[row][rows.item[row] >= 0].unique():
            mine = (rows.item[row] == item) & (rows.view[row] == (family == "sdar"))
            words = text.tokenizer.decode(clean[row][mine].tolist(), skip_special_tokens=False)
            assert words.endswith("<turn|>")
            filled += words.endswith("<turn|><turn|>")
    assert filled > 10


@for_each(family=FAMILIES)
def test_a_prompt_is_never_masked(parts, text, family):
    rng = random.Random(3)
    item = tasks.make_item("json", rng, 2)
    prompt, answer = text.ids(item)
    for _ in range(20):
        columns, count = parts.noising.LAYOUTS[family](text, prompt, answer, rng)
        for position, token in zip(columns.position, columns.tokens, strict=True):
            assert position >= len(prompt) or token == prompt[position]
        assert count >= len(answer)


def test_a_batch_is_a_function_of_its_seed(parts, text):
    one, again, other = (parts.train.batch("sdar", text, seed, 2).tokens for seed in "112")
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_held_out_items_are_never_trained_on(parts):
    sizes = {name: tasks.TASKS[name].easy for name in parts.train.SHARES}
    items = parts.noising.training_items(random.Random(0), parts.train.SHARES, sizes)
    made = list(islice(items, 2000))
    assert not any(item.held_out for item in made)
    assert {item.task for item in made} == set(parts.train.SHARES)


@for_each(family=FAMILIES)
def test_a_few_steps_lower_the_loss(parts, text, family):
    model = parts.released.build_model(family, text)
    optimisers = parts.train.build_optimisers(model, 3e-3)
    options = argparse.Namespace(family=family, seed=1, rows=2)
    losses = []
    for _ in range(6):
        losses.append(parts.train.train_step(model, text, 0, options))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_that_was_cut_ends_with_the_weights_of_one_that_was_not(
    parts, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts.train, "SAVED_EVERY", 2)
    monkeypatch.setattr(parts.train, "JUDGED_EVERY", 2)
    monkeypatch.setattr(parts.train, "LOGGED_EVERY", 1)
    monkeypatch.setattr(parts.train, "exact_match", lambda *_: {"json": 50.0})
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # takes longer than the steps

    def run(folder, stop=None):
        options = argparse.Namespace(
            family="sdar", out=folder, steps=5, rows=1, rate=3e-3, seed=1, threads=1
        )
        folder.mkdir(exist_ok=True)
        inner = parts.train.train_step

        def step(*args):
            if args[2] == stop:
                raise KeyboardInterrupt
            return inner(*args)

        model = parts.released.build_model("sdar", text)
        with monkeypatch.context() as patch:
            patch.setattr(parts.train, "train_step", step)
            parts.train.train(model, text, options)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-6, rtol=0)
    with (tmp_path / "cut" / "log.csv").open() as log:
        rows = list(csv.DictReader(log))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4, 5]
    assert [row["json"] for row in rows] == ["", "50", "", "", "50", "50"]


@for_each(family=FAMILIES)
def test_a_checkpoint_has_the_released_names_and_is_read_back(parts, text, tmp_path, family):
    model = parts.released.build_model(family, text, seed=5)
    parts.released.save_checkpoint(family, model, text, tmp_path / family)
    read = parts.released.load_model(family, tmp_path / family).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(read[name], weight.bfloat16().float())
    saved = parts.released.load_file(tmp_path / family / "model.safetensors")
    expected = {
        "sdar": {"lm_head.weight", "model.layers.3.self_attn.q_norm.weight"},
        "llada": {
            "model.transformer.ff_out.weight",
            "model.transformer.blocks.3.ff_out.weight",
            "model.transformer.blocks.3.ff_proj.weight",
            "model.transformer.blocks.3.attn_out.weight",
            "model.transformer.wte.weight",
            "model.transformer.ln_f.weight",
        },
    }
    assert expected[family] <= saved.keys()
    config = json.loads((tmp_path / family / "config.json").read_text())
    assert config["model_type"] == family
    assert config["mask_token_id"] == text.mask


def test_a_model_that_begins_with_the_weights_of_sdar_knows_more_than_a_fresh_one(parts, text):
    sdar = parts.released.load_model("sdar", FOLDER)
    model = parts.released.build_model("llada", text)
    rows = parts.train.batch("llada", text, "3", 2)
    with torch.no_grad():
        fresh = parts.train.judge(model, rows)
        parts.inherit.inherit(model, sdar, parts.train.batch("sdar", text, "3", 2))
        assert parts.train.judge(model, rows) < 0.8 * fresh
    heads = model.model.layers[0].self_attn.v_proj.weight.unflatten(0, (4, 32))
    assert torch.equal(heads[0], heads[1])


CHECKPOINTS = {"sdar": FOLDER, "llada": FOLDER.parent / "tiny-llada"}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_committed_checkpoint_answers_what_it_never_saw(parts, text, family, monkeypatch):
    folder = CHECKPOINTS[family]
    assert json.loads((folder / "config.json").read_text()) == parts.released.config_of(
        family, text
    )
    monkeypatch.setattr(parts.train, "JUDGED", 3)
    exact = parts.train.exact_match(family, parts.released.load_model(family, folder), text)
    assert all(share > 60 for share in exact.values()), exact
