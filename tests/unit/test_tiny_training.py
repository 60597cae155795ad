"""Training the tiny model: what its packed pass computes is what generation computes."""

import copy
import csv
import random
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import build_model
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import PAD, TURN_END, token_id
from vllm_diffusion.models.diffusion_gemma.testing.weights import randomise
from vllm_diffusion.testing.tasks import TASKS

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-diffusiongemma"


@pytest.fixture(scope="module")
def trainer():
    """The folder's `train` and the modules it imports by their plain names."""
    names = ("model", "packing", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        import train

        yield train
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(trainer):
    return trainer.trained_tokenizer()


@pytest.fixture(scope="module")
def model(trainer):
    """Random weights without equal layers; layer scalars stay 1, as training leaves them."""
    model = build_model(trainer.SPEC).eval()
    randomise(model, seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(1.0)
    return model


def batch(trainer, tokenizer, seed, rows=2):
    items = partial(trainer.training_items, shares=trainer.shares_at(0))
    return trainer.pack(tokenizer, items, rows=rows, canvas=64, vocab=640, seed=seed)


def views(rows):
    """(row, tokens before a view, tokens of the view, mask of the view) of every view."""
    for row in range(rows.item.shape[0]):
        for item in rows.item[row].unique().tolist():
            mine = rows.item[row] == item
            for view in rows.view[row][mine].unique().tolist() if item >= 0 else []:
                mask = mine & (rows.view[row] == view)
                if view > 0:
                    start = int(rows.start[row][mask][0])
                    before = mine & (rows.view[row] == 0) & (rows.position[row] < start)
                    yield row, rows.tokens[row][before], rows.tokens[row][mask], mask


@for_each(seed=[5, 7])
def test_the_packed_pass_gives_the_logits_of_transformers(trainer, tokenizer, model, seed):
    rows = batch(trainer, tokenizer, seed, rows=4)
    forward = trainer.PackedPass(copy.deepcopy(model))
    masks = rows.visibility(), rows.visibility(trainer.SPEC.sliding_window)
    longest = 0
    with torch.no_grad():
        first = forward(rows, torch.zeros(4, trainer.ROW, trainer.SPEC.hidden), *masks)
        second = forward(rows, forward.soften(first, 0.6), *masks)
        for row, before, canvas, mask in views(rows):
            inputs = {"input_ids": before[None], "decoder_input_ids": canvas[None]}
            expected = model(**inputs).logits
            torch.testing.assert_close(first[row][mask], expected[0], atol=2e-4, rtol=0)
            expected = model(**inputs, self_conditioning_logits=expected / 0.6).logits
            torch.testing.assert_close(second[row][mask], expected[0], atol=2e-4, rtol=0)
            longest = max(longest, before.numel())
    if seed == 5:
        assert longest > trainer.SPEC.sliding_window, "no view beyond the window"


def test_rows_are_filled_with_whole_items_and_noise_touches_judged_tokens_only(trainer, tokenizer):
    rows = batch(trainer, tokenizer, 11, rows=12)
    assert (rows.item >= 0).float().mean() > 0.75
    judged = rows.targets != trainer.IGNORED
    seen = list(views(rows))
    assert all(mask.sum() == trainer.SPEC.canvas for _, _, _, mask in seen)
    whole = [(r, m) for r, _, _, m in seen if judged[r][m].all()]
    levels = [(rows.tokens[r][m] != rows.targets[r][m]).float().mean() for r, m in whole]
    assert min(levels) < 0.2
    assert max(levels) > 0.8
    assert not judged[rows.view == 0].any()


def test_a_template_is_the_answer_with_padding_in_its_holes(trainer, tokenizer):
    rows = batch(trainer, tokenizer, 11, rows=12)
    judged = rows.targets != trainer.IGNORED
    pad, end = token_id(PAD), token_id(TURN_END)

    def text(row, mask):
        clean = torch.where(judged[row], rows.targets[row], rows.tokens[row])[mask]
        return tokenizer.decode(clean[clean != pad].tolist(), skip_special_tokens=False)

    answers, templates = {}, {}
    for row, _, _, mask in views(rows):
        key = (row, int(rows.item[row][mask][0]), int(rows.start[row][mask][0]))
        (answers if judged[row][mask].all() else templates)[key] = text(row, mask), mask
    both = [key for key in templates if key in answers and answers[key][0].endswith(TURN_END)]
    assert len(both) > 3
    slack = 0
    for key in both:
        shown, mask = templates[key]
        if shown.endswith(TURN_END):  # the padding has not pushed its end out of the canvas
            assert shown == answers[key][0]
        targets = rows.targets[key[0]][mask]
        assert 0 < judged[key[0]][mask].sum() < trainer.SPEC.canvas
        assert not (targets == end).any()
        slack += int((targets == pad).sum())
    assert slack > len(both)


def test_a_batch_is_a_function_of_its_seed(trainer, tokenizer):
    one, again, other = (batch(trainer, tokenizer, seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.fixture
def packing(trainer):
    return sys.modules[trainer.pack.__module__]


def test_held_out_items_are_never_trained_on(packing):
    items = islice(packing.training_items(random.Random(0), packing.shares_at(0)), 2000)
    assert not any(item.held_out for item in items)


def test_every_task_is_trained_on_at_every_step(packing):
    assert min(packing.SHARES) == 0
    assert all(set(shares) == set(TASKS) for shares in packing.SHARES.values())


def test_splitting_and_stacking_experts_changes_nothing(trainer, model):
    changed = copy.deepcopy(model)
    trainer.split_experts(changed)
    trainer.stack_experts(changed)
    before, after = model.state_dict(), changed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_was_cut_ends_with_the_weights_of_one_that_was_not(
    trainer, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "SAVED_EVERY", 2)
    monkeypatch.setattr(trainer, "LOGGED_EVERY", 1)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # takes longer than the steps

    def run(folder, stop=None):
        sys_argv = ["train.py", "--out", str(folder), "--steps", "5", "--rows", "1"]
        monkeypatch.setattr(sys, "argv", [*sys_argv, "--threads", "1"])
        options = trainer.parse_arguments()
        options.out.mkdir(exist_ok=True)
        inner = trainer.train_step

        def step(*args):
            if args[2] == stop:
                raise KeyboardInterrupt
            return inner(*args)

        model = build_model(trainer.SPEC)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", step)
            trainer.train(model, tokenizer, options)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-6, rtol=0)
    initial = build_model(trainer.SPEC).state_dict()
    moved = [name for name in whole if not torch.equal(initial[name], whole[name])]
    assert any("experts.gate_up_proj" in name for name in moved)
    assert not any("vision" in name for name in moved)
    with (tmp_path / "cut" / "log.csv").open() as log:
        assert [int(row["step"]) for row in csv.DictReader(log)] == [1, 2, 3, 3, 4, 5]
