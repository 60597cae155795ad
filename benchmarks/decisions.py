"""Cost of a decision beside a generated answer, and whether its probabilities are the model's.

    python benchmarks/decisions.py [--n N] [--gaps N] [--engines ours native-standin]

The questions are the gaps of held-out sudokus, the model is examples/tiny-diffusiongemma in fp32
(trained, its canvases end when their rule says so), the layers run eagerly. Every engine runs in a
process of its own, and is asked three ways:

    answer      generate the grid: the published rule, until the canvas settles
    reads       a read-only canvas and one step for every gap, as `/v1/systemone` asks for every
                question of a request
    one canvas  the same, all gaps of a grid from one canvas, as vLLM 0.33 does for `joint`

    ms          by the clock, for each gap, median of the batches
    cpu ms      processor time of the engine's process, which a busy host disturbs less; quartiles
    forwards    of a batch, the prompt's included
    right       of the gaps; a read's is the likeliest digit
    error       largest difference of a digit's probability among the four to Transformers' forward
                over the same canvas at temperature 1, and of their mass over the vocabulary

`native-standin` is vLLM's own model with our versions of its Triton kernels; `native` runs these in
Triton's interpreter.
"""
# ruff: noqa: ANN401 - wraps functions of vLLM, which are not followed by a type checker

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any

import _report
from _cell import measure
from _native_host import has_gpu, pretend_triton_has_a_cpu_backend, use_stand_ins
from engine import environment_of
from tokenizers import Tokenizer

from vllm_diffusion.testing.tasks import Item, held_out_items

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
ENGINES = ("ours", "native-standin")
WAYS = ("answer", "reads", "one canvas")
AT_ONCE = (1, 8)
WIDTH = 32
DIGITS = "1234"


def main() -> None:
    """Run every engine and Transformers, and print them side by side."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--n", type=int, default=64, help="sudokus")
    arguments.add_argument("--gaps", type=int, default=7, help="gaps of a sudoku")
    arguments.add_argument("--engines", nargs="+", choices=(*ENGINES, "native"), default=ENGINES)
    arguments.add_argument("--worker", help="internal: run one engine here")
    options = arguments.parse_args()
    count = 2 * AT_ONCE[-1] if options.quick else options.n
    items = list(held_out_items("sudoku", count, seed=3, sizes=[options.gaps]))
    if options.worker:
        worker = truth if options.worker == "transformers" else run
        print(json.dumps(worker(options.worker, [Grid(item) for item in items])))
        return
    given = ["--n", str(count), "--gaps", str(options.gaps)]
    found = {
        engine: measure(
            __file__,
            *(*given, "--worker", engine),
            environment=environment_of(engine),
            name=engine,
        )
        for engine in ("transformers", *options.engines)
    }
    report(found, [Grid(item) for item in items], options.json)


class Grid:
    """A sudoku, and its canvas: the grid with noise in the gaps, the end of the turn, padding."""

    def __init__(self, item: Item) -> None:
        tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        grid = item.prompt.split()[1]
        self.item = item
        self.gaps = [at for at, cell in enumerate(grid) if cell == "0"]
        self.digits = [tokenizer.token_to_id(digit) for digit in DIGITS]
        self.messages = [{"role": "user", "content": item.prompt}]
        self.canvas = [tokenizer.token_to_id(cell) for cell in grid]
        rng = random.Random(item.prompt)
        for at in self.gaps:
            self.canvas[at] = rng.randrange(tokenizer.get_vocab_size())
        self.canvas.append(tokenizer.token_to_id("<turn|>"))
        self.canvas += [tokenizer.token_to_id("<pad>")] * (WIDTH - len(self.canvas))

    def asked(self, way: str) -> list[SamplingParams]:
        """The requests of one way of asking for all gaps."""
        from vllm import SamplingParams

        if way == "answer":
            return [SamplingParams(max_tokens=WIDTH)]
        options = {
            "diffusion_seed_canvas": self.canvas,
            "diffusion_canvas_length": WIDTH,
            "diffusion_max_steps": 1,
            "diffusion_read_only": True,
        }
        last = self.gaps if way == "reads" else self.gaps[-1:]
        return [
            SamplingParams(max_tokens=at + 1, logprob_token_ids=self.digits, extra_args=options)
            for at in last
        ]

    def read(self, way: str, outputs: list[Any]) -> list[list[float]]:
        """[gaps, 4] log-probabilities of the digits."""
        places = [
            outputs[number if way == "reads" else 0].outputs[0].logprobs[at]
            for number, at in enumerate(self.gaps)
        ]
        return [[place[digit].logprob for digit in self.digits] for place in places]

    def right(self, said: list[str]) -> int:
        """How many of the gaps these digits fill."""
        return sum(digit == self.item.answer[at] for at, digit in zip(self.gaps, said, strict=True))


def run(engine: str, grids: list[Grid]) -> dict[str, Any]:
    """Ask one engine every way, so many grids at once."""
    if engine == "native" and not has_gpu():
        pretend_triton_has_a_cpu_backend()
    if engine == "native-standin":
        use_stand_ins()
    from vllm import LLM

    llm = LLM(
        str(CHECKPOINT),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=AT_ONCE[-1] * len(grids[0].gaps),
        limit_mm_per_prompt={"image": 0, "video": 0},
    )
    forwards = forwards_of(llm)
    result = {}
    for way in WAYS:
        for at_once in AT_ONCE:
            ask(llm, grids[:at_once], way)  # warm up: compilation, allocator
            batches = []
            for start in range(0, len(grids), at_once):
                batch = grids[start : start + at_once]
                assert llm.reset_prefix_cache()
                before, clock, cpu = forwards(), time.perf_counter(), time.process_time()
                found = ask(llm, batch, way)
                batches.append(
                    {
                        "seconds": time.perf_counter() - clock,
                        "cpu": time.process_time() - cpu,
                        "forwards": forwards() - before,
                        "found": found,
                    }
                )
            result[f"{way}, {at_once}"] = batches
    return result


def ask(llm: LLM, grids: list[Grid], way: str) -> list[Any]:
    """What an engine says of every grid: its answer, or the digits' log-probabilities."""
    asked = [grid.asked(way) for grid in grids]
    outputs = llm.chat(
        [grid.messages for grid, params in zip(grids, asked, strict=True) for _ in params],
        [each for params in asked for each in params],
        use_tqdm=False,
    )
    found = []
    for grid, params in zip(grids, asked, strict=True):
        own, outputs = outputs[: len(params)], outputs[len(params) :]
        found.append(own[0].outputs[0].text if way == "answer" else grid.read(way, own))
    return found


def forwards_of(llm: LLM) -> Any:
    """Counts the passes of the engine's model, of which this process sees all."""
    count = 0
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    original = worker.model_runner.execute_model

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += scheduled.total_num_scheduled_tokens > 0
        return original(scheduled, *args, **kwargs)

    worker.model_runner.execute_model = execute_model
    return lambda: count


def truth(_: str, grids: list[Grid]) -> list[list[list[float]]]:
    """[grids, gaps, 4] log-probabilities of Transformers over the same canvases."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    found = []
    for grid in grids:
        text = tokenizer.apply_chat_template(
            grid.messages, add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model.eval()(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([grid.canvas])
            ).logits[0]
        scores = logits.double().log_softmax(-1)
        found.append(scores[grid.gaps][:, grid.digits].tolist())
    return found


def report(found: dict[str, Any], grids: list[Grid], file: Path | None) -> None:
    """Print the table and the headline."""
    theirs = found.pop("transformers")
    rows: list[dict[str, _report.Value]] = []
    flat: dict[str, _report.Value] = {"grids": len(grids), "gaps": len(grids[0].gaps)}
    for at_once in AT_ONCE:
        for way in WAYS:
            for engine, result in found.items():
                batches = result[f"{way}, {at_once}"]
                said = [each for batch in batches for each in batch["found"]]
                gaps = at_once * len(grids[0].gaps)
                cpu = [1e3 * batch["cpu"] / gaps for batch in batches]
                low, middle, high = quantiles(cpu, n=4)
                cell: dict[str, _report.Value] = {
                    "ms": median(1e3 * batch["seconds"] / gaps for batch in batches),
                    "cpu ms": middle,
                    "quartiles": f"{low:.3g}..{high:.3g}",
                    "forwards": fmean(batch["forwards"] for batch in batches),
                    "right %": 100 * right(grids, way, said) / (len(grids) * len(grids[0].gaps)),
                    "error": None if way == "answer" else largest(said, theirs, among),
                    "of mass": None if way == "answer" else largest(said, theirs, mass),
                }
                rows.append({"grids": at_once, "asked": way, "engine": engine, **cell})
                flat |= {f"{engine}.{way}.{at_once}.{key}": value for key, value in cell.items()}
    _report.print_table(rows)
    if "ours" not in found:
        sys.exit()
    one, answer = (flat[f"ours.{way}.1.cpu ms"] for way in ("one canvas", "answer"))
    assert isinstance(one, float)
    assert isinstance(answer, float)
    _report.finish(
        flat, f"a decision takes {one / answer:.2f} of a generated answer's processor time", file
    )


def right(grids: list[Grid], way: str, said: list[Any]) -> int:
    """Gaps that are filled rightly."""
    total = 0
    for grid, each in zip(grids, said, strict=True):
        if way == "answer":
            total += grid.right([each[at : at + 1] for at in grid.gaps])
        else:
            total += grid.right([DIGITS[row.index(max(row))] for row in each])
    return total


def among(row: list[float]) -> list[float]:
    """Probabilities of the digits among each other."""
    weights = [math.exp(score) for score in row]
    return [weight / sum(weights) for weight in weights]


def mass(row: list[float]) -> list[float]:
    """What the digits have together of the whole vocabulary."""
    return [sum(math.exp(score) for score in row)]


def largest(ours: list[Any], theirs: list[Any], what: Any) -> float:
    """Largest difference of a number of a gap."""
    return max(
        abs(one - other)
        for grid, true in zip(ours, theirs, strict=True)
        for row, true_row in zip(grid, true, strict=True)
        for one, other in zip(what(row), what(true_row), strict=True)
    )


if __name__ == "__main__":
    main()
