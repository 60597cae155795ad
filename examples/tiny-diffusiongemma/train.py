"""Train the tiny DiffusionGemma of this folder: `python train.py --out DIR [--steps N]`.

Uniform-noise block diffusion: tokens of a canvas are replaced by random ones at a level from
U(0, 1), and cross-entropy is taken on all of its rows. Half of the steps are conditioned on the
model's own belief. A run that was cut goes on where it stopped; batches depend on seed and step
alone, so it ends with the same weights up to rounding.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import argparse
import copy
import csv
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import PackedPass
from packing import IGNORED, ROW, pack, shares_at, training_items
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import (
    TinySpec,
    build_model,
    save_checkpoint,
)
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import build_tokenizer
from vllm_diffusion.testing import tasks

SPEC = TinySpec(
    seed=1,
    canvas=64,
    vocab=640,
    hidden=128,
    layers=4,
    intermediate=256,
    expert_intermediate=128,
    sliding_window=128,
    dtype="bfloat16",
)
WARM_UP = 200
"""Steps until the full learning rate."""

COOL_DOWN = 0.25
"""Last share of the steps, over which it falls to zero; a longer run shares all steps before."""

CONDITIONED = 0.5
"""Share of the steps that see the model's own belief of a step before."""

EXPERT_MATRICES = ("gate_up_proj", "down_proj")

LOGGED_EVERY = 50
SAVED_EVERY = 500


def main() -> None:
    """Train, and write checkpoint, log and state into the folder that was asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = trained_tokenizer()
    model = build_model(SPEC)
    train(model, tokenizer, options)
    save_checkpoint(options.out, SPEC, model, tokenizer)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the tiny DiffusionGemma.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log.csv and state.pt")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--rows", type=int, default=12, help=f"batch, in rows of {ROW} tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of both optimisers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def trained_tokenizer() -> Tokenizer:
    """Tokenizer over the tasks' own words."""
    rng = random.Random(0)  # noqa: S311 -- reproducible, not secret
    items = [
        tasks.make_item(name, rng, rng.choice(task.sizes))
        for name, task in tasks.TASKS.items()
        for _ in range(1000)
    ]
    return build_tokenizer(
        SPEC.vocab, [text for item in items for text in (item.prompt, item.answer)]
    )


def train(model: Any, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Optimise the text weights of `model` in place; the vision tower keeps its random ones."""
    split_experts(model)
    weights = {
        name: p
        for name, p in model.named_parameters()
        if ".vision_tower." not in name and ".embed_vision." not in name
    }
    optimisers = build_optimisers(weights, options.rate)
    begun = resume(options.out / "state.pt", weights, optimisers)
    forward = torch.compile(PackedPass(model), dynamic=False)
    smooth, clock = 0.0, time.monotonic()
    progress = tqdm(range(begun, options.steps), initial=begun, total=options.steps)
    for step in progress:
        rate = options.rate * scheduled(step, options.steps)
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        loss = train_step(forward, tokenizer, step, options)
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        smooth = loss if step == begun else 0.98 * smooth + 0.02 * loss
        done = step + 1
        progress.set_postfix(loss=f"{smooth:.4f}")
        if done % LOGGED_EVERY == 0:
            log(options.out / "log.csv", done, smooth, rate, time.monotonic() - clock)
            clock = time.monotonic()
        if done % SAVED_EVERY == 0 or done == options.steps:
            save(options.out / "state.pt", done, weights, optimisers)
            snapshot = copy.deepcopy(model)
            stack_experts(snapshot)
            save_checkpoint(options.out / "latest", SPEC, snapshot, tokenizer)
    stack_experts(model)


def scheduled(step: int, steps: int) -> float:
    """Share of the learning rate at `step` of `steps`."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def train_step(forward: Any, tokenizer: Tokenizer, step: int, options: argparse.Namespace) -> float:
    """Add the gradients of one batch, and return its loss in nats a token."""
    rng = random.Random(f"{options.seed}:{step}")  # noqa: S311 -- reproducible, not secret
    rows = pack(
        tokenizer,
        partial(training_items, shares=shares_at(step)),
        rows=options.rows,
        canvas=SPEC.canvas,
        vocab=SPEC.vocab,
        seed=rng.getrandbits(32),
    )
    soft = torch.zeros(options.rows, ROW, SPEC.hidden)
    masks = rows.visibility(), rows.visibility(SPEC.sliding_window)
    with torch.autocast("cpu", torch.bfloat16):
        if rng.random() < CONDITIONED:
            with torch.no_grad():
                # The released schedule hands on beliefs at temperatures between 0.8 and 0.4.
                soft = forward.soften(forward(rows, soft, *masks), rng.uniform(0.4, 0.8)).float()
        logits = forward(rows, soft, *masks)
    loss = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.item()


def build_optimisers(weights: dict[str, Any], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embedding, router, norms."""
    apart = ("embed", "router", "norm", "scale")
    matrices = {n: p for n, p in weights.items() if not any(word in n for word in apart)}
    others = {n: p for n, p in weights.items() if n not in matrices}
    return [
        torch.optim.Muon(
            matrices.values(), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others.values(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]


def split_experts(model: Any) -> None:
    """Hold every expert's matrices apart, as Muon needs them; `stack_experts` undoes it."""
    for encoder, decoder in expert_pairs(model):
        for name in EXPERT_MATRICES:
            stacked = getattr(encoder, name).detach()
            delattr(decoder, name)
            delattr(encoder, name)
            setattr(encoder, name, nn.ParameterList([matrix.clone() for matrix in stacked]))


def stack_experts(model: Any) -> None:
    """Put the experts' matrices back into one tensor, as checkpoints have them."""
    for encoder, decoder in expert_pairs(model):
        for name in EXPERT_MATRICES:
            stacked = nn.Parameter(torch.stack([p.detach() for p in getattr(encoder, name)]))
            delattr(encoder, name)
            setattr(encoder, name, stacked)
            setattr(decoder, name, stacked)


def expert_pairs(model: Any) -> list[tuple[Any, Any]]:
    """Experts of every layer, in the encoder and in the decoder, which share their weights."""
    encoder, decoder = model.model.encoder.language_model, model.model.decoder
    return [
        (one.experts, other.experts)
        for one, other in zip(encoder.layers, decoder.layers, strict=True)
    ]


def resume(path: Path, weights: dict[str, Any], optimisers: list[torch.optim.Optimizer]) -> int:
    """Load what `save` wrote, if anything, and return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["weights"][name])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return int(state["step"])


def save(
    path: Path, step: int, weights: dict[str, Any], optimisers: list[torch.optim.Optimizer]
) -> None:
    """Write everything that a later process needs; a cut while writing leaves the old state."""
    state = {
        "step": step,
        "weights": {name: parameter.detach() for name, parameter in weights.items()},
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def log(path: Path, step: int, loss: float, rate: float, seconds: float) -> None:
    """Append one line."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "loss", "rate", "seconds"])
        writer.writerow([step, f"{loss:.4f}", f"{rate:.2e}", f"{seconds:.1f}"])


if __name__ == "__main__":
    main()
