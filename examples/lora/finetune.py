"""Teach the tiny DiffusionGemma a new task with LoRA, serve the adapter, and count right answers.

    python examples/lora/finetune.py --out DIR [--steps 120]

The task: a sentence becomes a card, `card Rosa from Madrid works as a clerk at 55.` is answered
with `Rosa/55/Madrid/clerk`. The base model knows such sentences, and answers with JSON.

Factors are trained by the packed pass of `examples/tiny-diffusiongemma`, which runs one tree of
layers over prompts and canvases alike, and are saved as PEFT saves them, once under the encoder's
names and once under the decoder's. PEFT itself trains two sets of factors, which is served as well.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion

from vllm_diffusion.testing.tasks import CITIES, JOBS, NAMES, SENTENCES, Item

CHECKPOINT = Path(__file__).parents[1] / "tiny-diffusiongemma"
sys.path.insert(0, str(CHECKPOINT))

from model import PackedPass  # noqa: E402 - beside the checkpoint
from packing import IGNORED, ROW, pack  # noqa: E402

RANK, ALPHA = 8, 16
ENCODER, DECODER = "model.encoder.language_model", "model.decoder"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""PEFT's `target_modules`; of every layer and of self-conditioning."""


def main() -> None:
    """Train, save, and ask the engine with and without the adapter."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(CHECKPOINT, dtype=torch.float32)
    adapted = adapt(model)
    train(model, adapted, options)
    save(adapted, options.out)
    print(f"{options.out}: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    base, tuned = exact_matches(options.out, options.items)
    print(f"right answers of {options.items}: base model {base}, with the adapter {tuned}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune the tiny DiffusionGemma with LoRA and serve the adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=4, help=f"batch, in rows of {ROW} tokens")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--items", type=int, default=100, help="held-out questions to ask")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


# ---- the task ----


def card(rng: random.Random) -> Item:
    """A sentence about a person, and their card."""
    person = {
        "name": rng.choice(NAMES),
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }
    sentence = rng.choice(SENTENCES).format(**person)
    return Item("card", 1, f"card {sentence}", "{name}/{age}/{city}/{job}".format(**person))


def cards(rng: random.Random) -> Iterator[Item]:
    """Endless items that are not held out."""
    while True:
        item = card(rng)
        if not item.held_out:
            yield item


# ---- training ----


class Adapted(nn.Module):
    """A frozen linear module and its factors: x -> W x + (alpha / rank) B A x."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.linear(x) + (ALPHA / RANK) * F.linear(F.linear(x, self.a), self.b)


def adapt(model: Any) -> dict[str, Adapted]:
    """Freeze the model and wrap its linear modules, by their names below either tree."""
    torch.manual_seed(0)
    model.requires_grad_(requires_grad=False)
    roots = {
        "layers": model.model.encoder.language_model.layers,
        "self_conditioning": model.model.decoder.self_conditioning,
    }
    adapted = {}
    for prefix, root in roots.items():
        for name, module in list(root.named_modules()):
            parent, _, last = name.rpartition(".")
            if last in MODULES and isinstance(module, nn.Linear):
                adapted[f"{prefix}.{name}"] = Adapted(module)
                setattr(root.get_submodule(parent), last, adapted[f"{prefix}.{name}"])
    return adapted


def train(model: Any, adapted: dict[str, Adapted], options: argparse.Namespace) -> None:
    """Cross-entropy on noised canvases, half of the steps conditioned on the model's own belief."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = model.config.text_config
    forward = PackedPass(model)
    factors = [factor for module in adapted.values() for factor in (module.a, module.b)]
    optimiser = torch.optim.AdamW(factors, lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, options.steps + 1)
    for step in range(options.steps):
        rng = random.Random(step)  # noqa: S311 -- reproducible, not secret
        rows = pack(
            tokenizer,
            cards,
            rows=options.rows,
            canvas=model.config.canvas_length,
            vocab=text.vocab_size,
            seed=rng.getrandbits(32),
        )
        masks = rows.visibility(), rows.visibility(text.sliding_window)
        soft = torch.zeros(options.rows, ROW, text.hidden_size)
        if rng.random() < 0.5:  # noqa: PLR2004 - half
            with torch.no_grad():
                soft = forward.soften(forward(rows, soft, *masks), rng.uniform(0.4, 0.8))
        logits = forward(rows, soft, *masks)
        loss = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def save(adapted: dict[str, Adapted], folder: Path) -> None:
    """Write the adapter as PEFT does: same factors for both trees, which share their weights."""
    tensors = {}
    for name, module in adapted.items():
        for tree in (DECODER,) if name.startswith("self_conditioning") else (ENCODER, DECODER):
            path = f"base_model.model.{tree}.{name}"
            tensors[f"{path}.lora_A.weight"] = module.a.detach().clone()
            tensors[f"{path}.lora_B.weight"] = module.b.detach().clone()
    config = {
        "base_model_name_or_path": str(CHECKPOINT),
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(MODULES),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


# ---- serving ----


def exact_matches(adapter: Path, count: int) -> tuple[int, int]:
    """Right answers to held-out questions, without and with the adapter, in one batch."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    rng = random.Random("held out")  # noqa: S311 -- reproducible, not secret
    items = [item for item in (card(rng) for _ in range(100 * count)) if item.held_out][:count]
    llm = LLM(
        str(CHECKPOINT),
        enable_lora=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    asked = [
        (item, request)
        for request in (None, LoRARequest("cards", 1, str(adapter)))
        for item in items
    ]
    outputs = llm.chat(
        [[{"role": "user", "content": item.prompt}] for item, _ in asked],
        SamplingParams(max_tokens=64, seed=1),
        lora_request=[request for _, request in asked],
        use_tqdm=False,
    )
    right = [
        item.answer == output.outputs[0].text.strip()
        for (item, _), output in zip(asked, outputs, strict=True)
    ]
    print(f"{items[0].prompt} -> {outputs[count].outputs[0].text.strip()}")
    return sum(right[:count]), sum(right[count:])


if __name__ == "__main__":
    main()
