"""Every family of models beside its reference loop, on one checkpoint, in one run.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--quick] [--family NAME ...] [--json FILE]

Each family runs in a process of its own on a checkpoint with random weights, in fp32, answers of
full length, first by the loop that defines it, then by `LLM()` with this plugin:

    diffusion_gemma   DiffusionGemmaForBlockDiffusion.generate of Transformers, with its cache; the
                      tokens are those of a second run, under the noise that ours draws
    sdar, llada       the dense loop of models/<family>/testing/reference.py on Transformers' Qwen3
                      and Llama: greedy, no cache, all text in every step under one mask

`tokens/s` is tokens per CPU second of the process, prompts included. `forwards` are those of a
request that denoise or commit; ours shares them among the requests of a batch. `different` counts
tokens of ours that are not the reference's. Where two positions are nearly as sure, the rounding of
fp32 may decide which is revealed first, and everything behind them differs.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
import torch
from _cell import measure

# Transformers under our noise, and checkpoints on which rounding decides nothing, are the tests'.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

if TYPE_CHECKING:
    from collections.abc import Callable

REFERENCE, ALONE, TOGETHER = "reference", "ours, one at a time", "ours, all at once"
LOOPS = (REFERENCE, ALONE, TOGETHER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    prompt: list[int]
    length: int
    sampling: dict[str, Any]
    """What else ours is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a loop made of all requests."""

    tokens: list[list[int]]
    forwards: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family's checkpoint and requests, and the answers of the loop that defines it."""

    checkpoint: Path
    asked: list[Asked]
    reference: Answers
    wanted: list[list[int]]
    """The tokens that ours is held to."""
    options: dict[str, Any]
    """Of the engine."""


def main() -> None:
    """Run every family and print it beside its reference."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--family", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    arguments.add_argument("--worker", choices=FAMILIES, help="internal: run one family here")
    options = arguments.parse_args()
    if options.worker:
        print(json.dumps(run(FAMILIES[options.worker], quick=options.quick)))
        return
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or the process would not have the CPU seconds
    }
    quick = ("--quick",) if options.quick else ()
    found = {
        family: measure(__file__, "--worker", family, *quick, environment=environment, name=family)
        for family in options.family
    }
    report(found, options.json)


def run(family: Callable[[Path, bool], Case], *, quick: bool) -> dict[str, Any]:
    """One family, in this process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        case = family(Path(folder), quick)
        from vllm import LLM

        llm = LLM(
            str(case.checkpoint),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=16,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
            **case.options,
        )
        answer(llm, case.asked[:1])  # what is made once is not measured
        singly = [answer(llm, [each]) for each in case.asked]
        alone = Answers(
            tokens=[tokens for each in singly for tokens in each.tokens],
            forwards=sum(each.forwards for each in singly),
            cpu_s=sum(each.cpu_s for each in singly),
        )
        together = answer(llm, case.asked)
        llm.llm_engine.engine_core.shutdown()
    loops = dict(zip(LOOPS, (case.reference, alone, together), strict=True))
    return {name: figures(loop, case.wanted) for name, loop in loops.items()}


def figures(answers: Answers, wanted: list[list[int]]) -> dict[str, Any]:
    """What a loop's answers come to."""
    tokens = sum(map(len, answers.tokens))
    pairs = [
        pair
        for said, right in zip(answers.tokens, wanted, strict=True)
        for pair in zip(said, right, strict=True)
    ]
    return {
        "tokens_per_s": tokens / answers.cpu_s,
        "forwards": answers.forwards,
        "tokens_per_forward": tokens / answers.forwards,
        "different": sum(token != other for token, other in pairs),
        "compared": len(pairs),
    }


def answer(llm: Any, asked: list[Asked]) -> Answers:  # noqa: ANN401 - vLLM is imported late
    """Ask ours for all of them at once."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=each.length,
            ignore_eos=True,
            extra_args={"diffusion_telemetry": True},
            **each.sampling,
        )
        for each in asked
    ]
    prompts = [{"prompt_token_ids": each.prompt} for each in asked]
    start = time.process_time()
    outputs = [each.outputs[0] for each in llm.generate(prompts, parameters, use_tqdm=False)]
    return Answers(
        tokens=[list(output.token_ids) for output in outputs],
        forwards=sum(output.diffusion.forwards for output in outputs),
        cpu_s=time.process_time() - start,
    )


# ---- the families ----


def diffusion_gemma(folder: Path, quick: bool) -> Case:
    """Transformers' own loop."""
    from helpers.doubt import decided_run
    from helpers.oracle import Oracle
    from helpers.parity import SPEC, conditioned_checkpoint, make_prompt

    checkpoint = conditioned_checkpoint(folder)
    oracle, asked, wanted = Oracle(checkpoint), [], []
    canvases = 1 if quick else 3
    for number in range(2 if quick else 8):
        prompt = make_prompt(40 + 7 * number, variant=number)
        seed, decided = decided_run(oracle, prompt, number, canvases=canvases)
        sampling = {"temperature": 1.0, "seed": seed}
        asked.append(Asked(prompt=prompt, length=canvases * SPEC.canvas, sampling=sampling))
        wanted.append([token for canvas in decided.canvases for token in canvas.tokens.tolist()])
    model, calls = oracle.model, []
    model.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    start = time.process_time()
    said = [
        model.generate(torch.tensor([each.prompt]), max_new_tokens=each.length).sequences
        for each in asked
    ]
    cpu_s = time.process_time() - start
    return Case(
        checkpoint=checkpoint,
        asked=asked,
        reference=Answers(
            tokens=[
                ids[0, len(each.prompt) :].tolist() for ids, each in zip(said, asked, strict=True)
            ],
            # Every canvas but the last is encoded, once.
            forwards=len(calls) + (canvases - 1) * len(asked),
            cpu_s=cpu_s,
        ),
        wanted=wanted,
        options={"limit_mm_per_prompt": {"image": 0, "video": 0}},
    )


def sdar(folder: Path, quick: bool) -> Case:
    """Blocks of a grid."""
    from vllm_diffusion.models.sdar.testing import checkpoint as maker
    from vllm_diffusion.models.sdar.testing import reference

    sizes = {} if quick else {"hidden": 256, "layers": 6, "vocab": 2048, "intermediate": 512}
    spec = maker.TinySpec(**sizes)
    return dense(folder, quick, maker, spec, lambda **asked: reference.answer(**asked, block=4))


def llada(folder: Path, quick: bool) -> Case:
    """Blocks of 32, the masks behind them in sight."""
    from vllm_diffusion.models.llada.testing import checkpoint as maker
    from vllm_diffusion.models.llada.testing import reference

    sizes = {} if quick else {"hidden": 256, "layers": 6, "vocab": 2048, "intermediate": 512}
    return dense(folder, quick, maker, maker.TinySpec(**sizes), reference.answer)


def dense(folder: Path, quick: bool, maker: Any, spec: Any, loop: Any) -> Case:  # noqa: ANN401 - a family's modules
    """A family with a dense loop of its own."""
    draw, length = random.Random(0), 40 if quick else 96
    ids = range(len(maker.SPECIAL_TOKENS), spec.vocab)
    asked = [
        Asked(prompt=draw.choices(ids, k=24 + 7 * n), length=length, sampling={"temperature": 0.0})
        for n in range(3 if quick else 8)
    ]
    checkpoint, model = maker.make_tiny_checkpoint(folder, spec), maker.build_model(spec)
    start = time.process_time()
    answers = [
        loop(model=model, prompt=each.prompt, length=length, mask_id=maker.MASK_ID)
        for each in asked
    ]
    reference = Answers(
        tokens=[each.tokens for each in answers],
        forwards=sum(steps for each in answers for steps in each.steps),
        cpu_s=time.process_time() - start,
    )
    return Case(
        checkpoint=checkpoint,
        asked=asked,
        reference=reference,
        wanted=reference.tokens,
        options={},
    )


FAMILIES = {"diffusion_gemma": diffusion_gemma, "sdar": sdar, "llada": llada}


def report(found: dict[str, dict[str, Any]], file: Path | None) -> None:
    """Print the table and the headline."""
    rows: list[dict[str, _report.Value]] = []
    flat: dict[str, _report.Value] = {}
    for family, loops in found.items():
        for loop, cell in loops.items():
            own = loop == REFERENCE
            rows.append(
                {
                    "family": family,
                    "loop": loop,
                    "tokens/s": cell["tokens_per_s"],
                    "is": f"{cell['tokens_per_s'] / loops[REFERENCE]['tokens_per_s']:.2f}x",
                    "forwards": cell["forwards"],
                    "tokens/forward": cell["tokens_per_forward"],
                    "different": "-" if own else f"{cell['different']} of {cell['compared']}",
                }
            )
            flat |= {f"{family}.{loop}.{key}": value for key, value in cell.items()}
    _report.print_table(rows)
    ours = [cell for loops in found.values() for name, cell in loops.items() if name != REFERENCE]
    wrong, compared = (sum(cell[key] for cell in ours) for key in ("different", "compared"))
    _report.finish(flat, f"ours: {wrong} of {compared} tokens different from the reference", file)


if __name__ == "__main__":
    main()
