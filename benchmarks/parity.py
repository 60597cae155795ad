"""Deviation of our engine and native vLLM from Transformers, one known pitfall at a time.

    python benchmarks/parity.py [--quick] [--json FILE]

There are three places where a port of DiffusionGemma easily departs from the published model. Each
is tested in isolation, both engines on the same checkpoint:

    scalars   encoder and decoder may hold different layer scalars.
              Checkpoint: they differ. Short prompts, first canvas.
    window    a canvas sees the same prefix from every row of a sliding layer.
              Checkpoint: equal scalars. Prompts beyond the window, first canvas.
    commit    a finished canvas is encoded with plain embeddings, like a prompt.
              Checkpoint: equal scalars. Short prompts, second and third canvas.
    all       three canvases behind long prompts, on the checkpoint with different scalars.

The oracle is Transformers' own `generate`. All three engines draw the same noise, keyed by request,
position and step; in native it replaces what torch.randint and its row statistics draw, its
arithmetic stays. Everything is fp32. Native runs with the plugin off and our stand-ins in place of
the Triton kernels that a CPU host cannot run; those only keep books.

`logits` is the largest difference over all steps up to the first whose input differs: later ones
answer another question. `from` is that step, counted from 0 as canvas.step.
"""
# ruff: noqa: ANN401 - wraps functions of vLLM, which are not followed by a type checker

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
import torch
from _native import NativeRecorder, Step

# The oracle and the probe are the tests' own.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

if TYPE_CHECKING:
    from helpers.oracle import OracleRun

ENGINES = ("ours", "native")
EXACT = 1e-4
"""Differences below it are rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """Where one kind of deviation shows alone."""

    name: str
    checkpoint: str
    prompt: int  # tokens
    canvases: int
    look_from: int  # first canvas that is compared


TRAPS = (
    Trap(name="scalars", checkpoint="apart", prompt=5, canvases=1, look_from=0),
    Trap(name="window", checkpoint="equal", prompt=300, canvases=1, look_from=0),
    Trap(name="commit", checkpoint="equal", prompt=5, canvases=3, look_from=1),
    Trap(name="all", checkpoint="apart", prompt=300, canvases=3, look_from=0),
)

# Wide enough that a short prompt and three canvases stay within it, so that only `window` reaches
# beyond.
WINDOW = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation that every engine runs."""

    trap: str
    prompt: list[int]
    seed: int
    canvases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine made of one request."""

    tokens: list[int]
    steps: list[Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One request of one engine against the oracle."""

    logits: float
    diverges: str | None  # canvas.step
    first_token: int | None  # index of the first generated token that differs
    tokens: int
    equal: int


def main() -> None:
    """Make the checkpoints, ask the oracle, run both engines and print them side by side."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--worker", choices=ENGINES, help="internal: run one engine here")
    arguments.add_argument("--folder", type=Path, help="internal")
    options = arguments.parse_args()
    if options.worker:
        work(options.worker, options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        oracle = ask_oracle(folder, prompts=1 if options.quick else 5)
        results = {
            (trap.name, engine): [
                compare(trap, answer, reference)
                for answer, (request, reference) in zip(answers, oracle, strict=True)
                if request.trap == trap.name
            ]
            for engine in ENGINES
            for answers in (measure(engine, folder),)
            for trap in TRAPS
        }
    report(results, options.json)


def ask_oracle(folder: Path, prompts: int) -> list[tuple[Request, OracleRun]]:
    """Write the checkpoints and the requests into ``folder`` and run Transformers on them."""
    from helpers.doubt import decided_run
    from helpers.oracle import Oracle
    from helpers.parity import SPEC, conditioned_checkpoint, make_prompt

    spec = replace(SPEC, sliding_window=WINDOW)
    oracles = {}
    for name in ("apart", "equal"):
        path = folder / name
        conditioned_checkpoint(path, spec, equal_scalars=name == "equal")
        oracles[name] = Oracle(path)
    asked = []
    for trap in TRAPS:
        for number in range(prompts):
            prompt = make_prompt(trap.prompt + 7 * number, variant=number)
            seed, run = decided_run(
                oracles[trap.checkpoint], prompt, number, canvases=trap.canvases
            )
            request = Request(trap=trap.name, prompt=prompt, seed=seed, canvases=trap.canvases)
            asked.append((request, run))
    (folder / "requests.json").write_text(json.dumps([asdict(request) for request, _ in asked]))
    return asked


def measure(engine: str, folder: Path) -> list[Answer]:
    """Run one engine over all requests in a process of its own."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in that process, where its steps can be seen
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_DIFFUSION": "1" if engine == "ours" else "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if engine == "native":
        # The compiler would freeze the random numbers we put in.
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, __file__, "--worker", engine, "--folder", str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=1800,
    )
    if result.returncode:
        sys.exit(f"{engine} failed with status {result.returncode}")
    answers: list[Answer] = torch.load(folder / f"{engine}.pt", weights_only=False)
    return answers


def work(engine: str, folder: Path) -> None:
    """Answer every request of ``folder`` and leave the answers there."""
    if engine == "native":
        from _native_host import use_stand_ins

        use_stand_ins()
    requests = [Request(**fields) for fields in json.loads((folder / "requests.json").read_text())]
    checkpoint_of = {trap.name: trap.checkpoint for trap in TRAPS}
    answers: dict[int, Answer] = {}
    for checkpoint in ("apart", "equal"):
        llm = start(folder / checkpoint)
        for index, request in enumerate(requests):
            if checkpoint_of[request.trap] == checkpoint:
                answers[index] = (run_ours if engine == "ours" else run_native)(llm, request)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    torch.save([answers[index] for index in range(len(requests))], folder / f"{engine}.pt")


def start(checkpoint: Path) -> Any:
    """An engine in this process."""
    from vllm import LLM

    gc.freeze()  # a start collects garbage eight times, each time through all modules
    return LLM(
        str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )


def generate(llm: Any, request: Request, seed: int | None) -> list[int]:
    """Token ids of one request, alone in the engine."""
    from helpers.parity import SPEC
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=request.canvases * SPEC.canvas, ignore_eos=True, seed=seed)
    (output,) = llm.generate([{"prompt_token_ids": request.prompt}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def run_ours(llm: Any, request: Request) -> Answer:
    """One request through the plugin, watched by the tests' probe."""
    from helpers.probe import Probe

    with Probe() as probe:
        tokens = generate(llm, request, request.seed)
    steps = [
        Step(start=step.start, canvas=step.canvas, logits=step.logits)
        for canvas in probe.run(request.seed).canvases
        for step in canvas
    ]
    return Answer(tokens=tokens, steps=steps)


def run_native(llm: Any, request: Request) -> Answer:
    """One request through vLLM's own sampler, with our noise where it draws its own."""
    with NativeRecorder(request.seed) as recorder:
        # Native refuses a seed; the recorder holds it.
        tokens = generate(llm, request, None)
    return Answer(tokens=tokens, steps=recorder.steps)


def compare(trap: Trap, answer: Answer, reference: OracleRun) -> Deviation:
    """One engine's run against Transformers', up to the first step with another input."""
    logits, diverges = 0.0, None
    for number, canvas in enumerate(reference.canvases):
        ours = [step for step in answer.steps if step.start == canvas.start]
        for index, (mine, theirs) in enumerate(zip(ours, canvas.steps, strict=False)):
            if not torch.equal(mine.canvas, theirs.canvas):
                diverges = f"{number}.{index}"
                break
            if number >= trap.look_from:
                logits = max(logits, float((mine.logits - theirs.logits).abs().max()))
        if diverges is None and len(ours) != len(canvas.steps):
            diverges = f"{number}.{min(len(ours), len(canvas.steps))}"
        if diverges is not None:
            break
    equal = [a == b for a, b in zip(answer.tokens, reference.tokens, strict=True)]
    return Deviation(
        logits=logits,
        diverges=diverges,
        first_token=None if all(equal) else equal.index(False),
        tokens=len(equal),
        equal=sum(equal),
    )


def report(results: dict[tuple[str, str], list[Deviation]], file: Path | None) -> None:
    """Print the table and the headline; a trap's row holds the worst of its requests."""
    rows = []
    flat: dict[str, _report.Value] = {}
    for (trap, engine), deviations in results.items():
        diverging = [d for d in deviations if d.diverges is not None]
        worst = {
            "logits": max(d.logits for d in deviations),
            "from": min((d.diverges for d in diverging if d.diverges), key=_in_order, default=None),
            "first_token": min(
                (d.first_token for d in deviations if d.first_token is not None), default=None
            ),
            "equal": sum(d.equal for d in deviations),
            "tokens": sum(d.tokens for d in deviations),
            "requests": len(deviations),
            "diverging": len(diverging),
        }
        flat.update({f"{trap}.{engine}.{key}": value for key, value in worst.items()})
        rows.append(
            {
                "trap": trap,
                "engine": engine,
                "logits": f"{worst['logits']:.1e}",
                "diverging": f"{worst['diverging']}/{worst['requests']}",
                "from": worst["from"],
                "first token": worst["first_token"],
                "equal tokens": f"{worst['equal']}/{worst['tokens']}",
            }
        )
    rows.sort(key=lambda row: [trap.name for trap in TRAPS].index(str(row["trap"])))
    _report.print_table(rows)
    print("native: plugin off, our stand-ins for its Triton kernels, our noise for its own")
    ours = max(float(flat[f"{trap.name}.ours.logits"] or 0) for trap in TRAPS)
    exact = all(flat[f"{trap.name}.ours.diverging"] == 0 for trap in TRAPS)
    native = ", ".join(f"{t.name} {float(flat[f'{t.name}.native.logits'] or 0):.1e}" for t in TRAPS)
    verdict = "and writes its tokens" if exact and ours < EXACT else "BUT LEAVES IT"
    headline = f"ours stays within {ours:.0e} of Transformers {verdict}; native is off by {native}"
    _report.finish(flat, headline, file)


def _in_order(diverges: str) -> tuple[int, ...]:
    return tuple(int(number) for number in diverges.split("."))


if __name__ == "__main__":
    main()
