"""Answers of SDAR and LLaDA by the dense loops of their definitions, on Transformers' decoders.

For the checkpoints that `examples/tiny-sdar/train.py` writes. Called in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from _answers import Answer, budget, chat, spare_of

from vllm_diffusion.testing.families import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.testing.tasks import Item

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny-sdar"))


def ask_dense(checkpoint: Path, family: str, items: Sequence[Item]) -> list[Answer]:
    """Greedy answers to items, one after the other, under the family's published rule."""
    from released import load_model
    from transformers import AutoTokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load_model(family, checkpoint)
    block = model.config.block_size
    ends = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    made = []
    for item in items:
        prompt = tokenizer.apply_chat_template(
            chat(item), add_generation_prompt=True, return_dict=False
        )
        written = part_of(family, "reference").answer(
            model,
            prompt,
            budget(item, tokenizer, block, spare_of(family)),
            mask_id=config["mask_token_id"],
            ends=ends,
            block=block,
        )
        ended = written.tokens[-1] in ends
        tokens = written.tokens[:-1] if ended else written.tokens
        made.append(
            Answer(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=tokens,
                finished=ended,
                steps=written.steps,
                # A block of SDAR is written by a forward of its own, but for the last one.
                commits=len(written.steps) - 1 if family == "sdar" else 0,
            )
        )
    return made
