"""Whether canvases satisfy their constraints, what that costs and what it gains.

    python benchmarks/constrained.py [--n N] [--seed N] [--json FILE] [--quick]
        [--validity trained|random ...] [--quality] [--overhead]

    --validity   random constraints of every kind (vllm_diffusion/testing/constraints.py), each
                 with its own prompt, seed and preset: how many outputs end, and how many of those
                 satisfy their constraint according to `jsonschema`, `re` and the like. `trained`
                 is examples/tiny-diffusiongemma, `random` has random weights, so that only the
                 constraint can make an output valid.
    --quality    the `json` task with and without its schema, the same items and seeds: exact
                 match, valid JSON, steps a canvas
    --overhead   a step of canvases of 64 and 256 rows at a vocabulary of 262,144, with and without
                 a constraint: milliseconds of the whole engine step

Without an option, the first two.
"""
# ruff: noqa: ANN401 - vLLM's and argparse's objects are not type-checked

from __future__ import annotations

import gc
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report

from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, make_tiny_checkpoint
from vllm_diffusion.testing.constraints import PROMPTS, draw_constraint
from vllm_diffusion.testing.tasks import held_out_items, solved

if TYPE_CHECKING:
    from vllm_diffusion.testing.constraints import Constraint

TRAINED = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"type": "string"},
        "job": {"type": "string"},
    },
    "required": ["name", "age", "city", "job"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON}
VOCAB = 262_144


def main() -> None:
    """Run what is asked for, one engine after the other."""
    parser = _report.parser(__doc__)
    parser.add_argument("--n", type=int, default=1000, help="constraints, or items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validity", action="append", choices=("trained", "random"))
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    options = parser.parse_args()
    if not (options.validity or options.quality or options.overhead):
        options.validity, options.quality = ["trained", "random"], True
    if options.quick:
        options.n = min(options.n, 60)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    flat: dict[str, _report.Value] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.validity or ():
            checkpoint = TRAINED
            if name == "random":
                checkpoint = make_tiny_checkpoint(Path(folder) / name, TinySpec(max_steps=8))
            flat |= validity(name, checkpoint, options)
        if options.quality:
            flat |= quality(options)
        if options.overhead:
            flat |= overhead(Path(folder) / "wide", options)
    headline = "; ".join(f"{key} {value}" for key, value in flat.items() if key.count(".") == 1)
    _report.finish(flat, headline, options.json)


# ---- validity -----------------------------------------------------------------------------------


def validity(name: str, checkpoint: Path, options: Any) -> dict[str, _report.Value]:
    """Ask for constrained outputs and judge every one."""
    rng = random.Random(options.seed)
    asked = [draw_constraint(rng) for _ in range(options.n)]
    llm = engine(checkpoint)
    chats = [[{"role": "user", "content": rng.choice(PROMPTS)}] for _ in asked]
    requests = [
        request(constraint, rng.choice((48, 150, 400)), rng.choice(preset_names()), number)
        for number, constraint in enumerate(asked)
    ]
    answers = answered(llm, chats, requests)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: Counter[str] = Counter()
    for constraint, answer in zip(asked, answers, strict=True):
        rows = (f"{constraint.kind}: {constraint.about}", "all")
        for row in rows:
            counts[row]["n"] += 1
            counts[row]["refused"] += isinstance(answer, str)
        if isinstance(answer, str):
            refusals[re.sub(r"\d+", "N", answer)] += 1
            continue
        valid = constraint.accepts(answer.text)
        for row in rows:
            counts[row]["ended"] += answer.finish_reason == "stop"
            counts[row]["ended, valid"] += answer.finish_reason == "stop" and valid
            counts[row]["cut"] += answer.finish_reason == "length"
            counts[row]["cut, valid"] += answer.finish_reason == "length" and valid
        if not valid:
            print(f"NOT VALID {constraint.kind} {constraint.value!r}: {answer.text!r}")
    close(llm)
    columns = ("n", "refused", "ended", "ended, valid", "cut", "cut, valid")
    print(f"\n{name} weights")
    rows = sorted(counts, key=lambda row: (row == "all", row))
    _report.print_table(
        [{"constraint": row, **{key: counts[row][key] for key in columns}} for row in rows]
    )
    for text, times in refusals.most_common():
        print(f"refused {times}: {text}")
    return {f"{name}.{key}": counts["all"][key] for key in columns}


def answered(llm: Any, chats: list[Any], requests: list[Any]) -> list[Any]:
    """What each request gave: an output, or why it was refused."""
    from vllm.exceptions import VLLMClientError

    tokenizer, core = llm.get_tokenizer(), llm.llm_engine
    answers: dict[str, Any] = {}
    for number, (chat, sampling) in enumerate(zip(chats, requests, strict=True)):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        try:
            core.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        except (ValueError, VLLMClientError) as error:
            answers[str(number)] = str(error)
    while core.has_unfinished_requests():
        answers |= {out.request_id: out.outputs[0] for out in core.step() if out.finished}
    return [answers[str(number)] for number in range(len(requests))]


def request(constraint: Constraint, max_tokens: int, preset: str, number: int) -> Any:
    """Sampling parameters of one constrained request."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(
        max_tokens=max_tokens,
        seed=number,
        structured_outputs=StructuredOutputsParams(**{constraint.kind: constraint.value}),
        extra_args={"diffusion_preset": preset},
    )


# ---- quality ------------------------------------------------------------------------------------


def quality(options: Any) -> dict[str, _report.Value]:
    """Extraction with and without the schema."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = engine(TRAINED)
    rows, flat = [], {}
    for sizes in (range(1, 3), range(3, 5)):
        items = list(held_out_items("json", options.n, seed=options.seed, sizes=sizes))
        conversations = [[{"role": "user", "content": item.prompt}] for item in items]
        for preset in ("reference", "balanced"):
            scores: dict[str, list[float]] = {}
            for arm in ("free", "schema"):
                constraint = StructuredOutputsParams(json=PEOPLE) if arm == "schema" else None
                sampling = [
                    SamplingParams(
                        max_tokens=300,
                        seed=number,
                        structured_outputs=constraint,
                        extra_args={"diffusion_preset": preset, "diffusion_telemetry": True},
                    )
                    for number in range(len(items))
                ]
                outputs = [
                    out.outputs[0] for out in llm.chat(conversations, sampling, use_tqdm=False)
                ]
                scores[arm] = [
                    100.0 * (out.finish_reason == "stop" and solved(item, out.text))
                    for item, out in zip(items, outputs, strict=True)
                ]
                steps = [canvas.steps for out in outputs for canvas in out.diffusion.canvases]
                difference = [a - b for a, b in zip(scores[arm], scores["free"], strict=True)]
                row = {
                    "people": f"{sizes[0]}-{sizes[-1]}",
                    "preset": preset,
                    "arm": arm,
                    "exact %": statistics.mean(scores[arm]),
                    "diff": f"{statistics.mean(difference):+.1f} +- "
                    f"{statistics.stdev(difference) / len(difference) ** 0.5:.1f}",
                    "valid JSON %": 100 * statistics.mean(is_json(out.text) for out in outputs),
                    "steps a canvas": statistics.mean(steps),
                }
                rows.append(row)
                label = f"quality.{row['people']}.{preset}.{arm}"
                flat |= {f"{label}.exact": row["exact %"], f"{label}.steps": row["steps a canvas"]}
    close(llm)
    print(f"\njson task, n = {options.n} items a row")
    _report.print_table(rows)
    return flat


def is_json(text: str) -> bool:
    """Whether a text is JSON at all."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# ---- overhead -----------------------------------------------------------------------------------


def overhead(folder: Path, options: Any) -> dict[str, _report.Value]:
    """Time of an engine step at the real vocabulary size."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    rows, flat = [], {}
    steps = 4 if options.quick else 16
    for canvas in (64, 256):
        spec = TinySpec(vocab=VOCAB, canvas=canvas, max_steps=steps, hidden=512)
        llm = engine(make_tiny_checkpoint(folder / str(canvas), spec))
        kinds: dict[str, dict[str, Any] | None] = {
            "free": None,
            "choice": {"choice": ["red", "green", "blue"]},
            "regex": {"regex": r"[a-z]+@[a-z]{2,8}\.(com|org)"},
            "schema": {"json": PEOPLE},
        }
        taken: dict[str, list[float]] = defaultdict(list)
        for again in range(3):
            for name, value in kinds.items():
                constraint = None if value is None else StructuredOutputsParams(**value)
                sampling = SamplingParams(
                    max_tokens=canvas,
                    seed=again,
                    ignore_eos=value is None,
                    structured_outputs=constraint,
                    extra_args={"diffusion_confidence_threshold": 0.0},
                )
                begun = time.process_time()
                llm.generate([{"prompt_token_ids": [2, 100, 101]}], sampling, use_tqdm=False)
                taken[name].append(1000 * (time.process_time() - begun) / (steps + 1))
        close(llm)
        # The first round compiles.
        free = statistics.median(taken["free"][1:])
        for name, times in taken.items():
            step = statistics.median(times[1:])
            row = {"canvas": canvas, "constraint": name, "ms a step": step, "of free": step / free}
            rows.append(row)
            print(row, flush=True)
            flat[f"overhead.{canvas}.{name}"] = step / free
    print(f"\nhidden 512, vocabulary {VOCAB}, processor time, {os.environ.get('OMP_NUM_THREADS')}")
    _report.print_table(rows)
    return flat


# ---- engines ------------------------------------------------------------------------------------


def engine(checkpoint: Path) -> Any:
    """An engine in this process."""
    from vllm import LLM

    return LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        # Without it vLLM takes most of the memory of the host, and refuses to start beside another.
        kv_cache_memory_bytes=256 << 20,
        seed=0,
    )


def close(llm: Any) -> None:
    """End an engine and give its memory back."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


if __name__ == "__main__":
    main()
