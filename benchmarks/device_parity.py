"""Deviation of the engine on this host's device from Transformers, from the engine's own traces.

    python benchmarks/device_parity.py [--quick] [--json FILE]

The oracle is Transformers' `generate` in fp32 on the CPU, with our noise and seeds at which no
token depends on rounding. Checkpoints are the trained tiny one and random ones. Ours answers the
same prompts, all at once, in these ways:

    eager      fp32, every product in fp32 too, each step recorded (`vllm_diffusion.trace`)
    graphs     the same, not recorded: CUDA graphs and the asynchronous scheduler, as served
    in step    the same under the synchronous scheduler
    bfloat16   heads as wide as the released model's, canvases of 256, bf16, recorded

In fp32 every token must equal Transformers'. In bf16 runs diverge at the first choice that depends
on rounding. There the entropies of the first step, whose input is the same, are compared, beside
Transformers' own in bf16 on this device.

`entropy` is the difference in nats over all steps with equal input: the largest in fp32, the root
mean square in bf16. A CPU host has the first way alone: there the others are the same, or are not
what is served.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
import numpy as np
import torch
from _cell import measure

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import make_tiny_checkpoint
from vllm_diffusion.testing.tasks import TASKS, held_out_items
from vllm_diffusion.trace.file import checksum, load
from vllm_diffusion.trace.record import VARIABLE

# The oracle is the tests' own.
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helpers.oracle import Oracle, OracleRun, OracleStep

    from vllm_diffusion.trace.file import Trace

TRAINED = ROOT / "examples" / "tiny-diffusiongemma"
FP32, BF16 = "float32", "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to run an engine."""

    name: str
    dtype: str = FP32
    recorded: bool = False
    eager: bool = False
    ahead: bool = True
    """Schedule a step before the last one's outcome is known, where the host can."""
    checkpoints: tuple[str, ...] = ("trained",)


WAYS = (
    Way(name="eager", recorded=True, eager=True, checkpoints=("trained", "random")),
    Way(name="graphs"),
    Way(name="in step", ahead=False),
    Way(name=BF16, dtype=BF16, recorded=True, checkpoints=("wide",)),
)
ON_CPU = WAYS[:1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked, the same of everybody."""

    prompt: list[int]
    seed: int
    canvases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """All requests of one checkpoint, run in one way, against the truth."""

    checkpoint: str
    way: str
    equal: int | None
    tokens: int | None
    entropy: float | None
    peer: float | None
    """The same of Transformers in that precision on this device."""
    steps: int
    """That were compared."""


def main() -> None:
    """Ask the oracle, run the engine in every way, print them side by side."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--worker", help="internal: the folder to answer the requests of")
    arguments.add_argument("--way", help="internal")
    options = arguments.parse_args()
    if options.worker:
        print(json.dumps(answer(Path(options.worker), Way(**json.loads(options.way)))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = WAYS if device == "cuda" else ON_CPU
    found = []
    with tempfile.TemporaryDirectory() as name:
        for checkpoint in make_checkpoints(Path(name), ways):
            asked = [way for way in ways if checkpoint.name in way.checkpoints]
            truth = ask_oracle(checkpoint, device, quick=options.quick)
            for way in asked:
                found.append(compare(checkpoint, way, *truth, device=device))
                print(f"{checkpoint.name}, {way.name}: done", file=sys.stderr)
    report(found, options.json)


def make_checkpoints(folder: Path, ways: Sequence[Way]) -> list[Path]:
    """Checkpoints in folders of their own, named `trained`, `random` and `wide`."""
    from helpers.parity import SPEC, conditioned_checkpoint

    (folder / "trained").symlink_to(TRAINED)
    made = [folder / "trained", conditioned_checkpoint(folder / "random")]
    if any(way.dtype == BF16 for way in ways):
        wide = replace(SPEC, head_dim=256, full_head_dim=512, canvas=256, sliding_window=300)
        made.append(make_tiny_checkpoint(folder / "wide", wide))
    return made


def prompts_of(checkpoint: Path, *, quick: bool) -> list[list[int]]:
    """Some shorter than the sliding window, some longer."""
    from helpers.parity import make_prompt
    from transformers import AutoTokenizer

    if checkpoint.name == "wide":
        return [make_prompt(length, variant=length) for length in (40, 350, 700)]
    if checkpoint.name == "random":
        return [
            make_prompt(length, variant=length)
            for length in ((9, 150) if quick else (1, 49, 57, 150))
        ]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tasks = ("chain", "json") if quick else ("chain", "json", "sudoku", "edit")
    items = [next(iter(held_out_items(t, 1, seed=7, sizes=TASKS[t].hard))) for t in tasks]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for item in items
    ]


def ask_oracle(
    checkpoint: Path, device: str, *, quick: bool
) -> tuple[list[Request], list[OracleRun], list[OracleRun]]:
    """The requests, the truth, and where precision is low what Transformers makes of it here."""
    from helpers.doubt import decided_run
    from helpers.oracle import Oracle

    oracle, prompts = Oracle(checkpoint), prompts_of(checkpoint, quick=quick)
    if checkpoint.name == "wide":
        requests = [Request(prompt=p, seed=n, canvases=1) for n, p in enumerate(prompts)]
        low = Oracle(checkpoint, dtype=torch.bfloat16, device=device)
        runs, peers = ([first_step(o, r) for r in requests] for o in (oracle, low))
        return requests, runs, peers
    requests, runs = [], []
    for number, prompt in enumerate(prompts):
        seed, run = decided_run(oracle, prompt, number, canvases=2)
        requests.append(Request(prompt=prompt, seed=seed, canvases=2))
        runs.append(run)
    return requests, runs, []


def first_step(oracle: Oracle, request: Request) -> OracleRun:
    """One canvas of one step."""
    return oracle.generate(
        request.prompt, seed=request.seed, canvases=1, overrides={"max_denoising_steps": 1}
    )


def answer(folder: Path, way: Way) -> list[list[int]]:
    """The tokens of every request of the folder; recorded there if the way is."""
    from vllm import LLM, SamplingParams

    asked = json.loads((folder / "requests.json").read_text())
    requests = [Request(**fields) for fields in asked["requests"]]
    longest = max(len(r.prompt) for r in requests) + asked["canvas"] * requests[0].canvases
    on_gpu = torch.cuda.is_available()
    steps = {"diffusion_max_steps": 1} if way.dtype == BF16 else {}
    llm = LLM(
        asked["checkpoint"],
        dtype=way.dtype,
        enforce_eager=way.eager,
        max_model_len=longest + 64,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        **({"async_scheduling": way.ahead} if on_gpu else {}),
        # What the interpreter-tested kernels multiply with; others round fp32 before they do.
        **({"kernel_config": {"moe_backend": "triton"}} if on_gpu and way.dtype == FP32 else {}),
    )
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt} for request in requests],
        [
            SamplingParams(
                max_tokens=request.canvases * asked["canvas"],
                ignore_eos=True,
                seed=request.seed,
                extra_args=dict(steps),
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(
    checkpoint: Path,
    way: Way,
    requests: Sequence[Request],
    truth: Sequence[OracleRun],
    peers: Sequence[OracleRun],
    *,
    device: str,
) -> Deviation:
    """Run the engine in one way, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canvas = len(truth[0].canvases[0].tokens)
        content = {
            "checkpoint": str(checkpoint),
            "canvas": canvas,
            "requests": [asdict(request) for request in requests],
        }
        (folder / "requests.json").write_text(json.dumps(content))
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Triton's products of fp32 would otherwise keep 10 bits of 23.
            "TRITON_F32_DEFAULT": "ieee",
        }
        if way.recorded:
            environment[VARIABLE] = str(folder / "traces")
        answers: list[list[int]] = measure(
            __file__,
            *("--worker", name, "--way", json.dumps(asdict(way))),
            environment=environment,
            name=f"ours, {way.name}",
        )
        traces = {t.seed: t for file in folder.glob("traces/*.npz") for t in (load(file),)}
    differences = [
        entropies(traces[request.seed], run)
        for request, run in zip(requests, truth, strict=True)
        if way.recorded
    ]
    low = way.dtype == BF16
    assert not way.recorded or all(differences), "no step had the truth's input"
    beside = [
        step_entropy(mine.canvases[0].steps[0]) - step_entropy(run.canvases[0].steps[0])
        for mine, run in zip(peers, truth, strict=False)
    ]
    pairs = [
        (mine, theirs)
        for tokens, run in zip(answers, truth, strict=True)
        for mine, theirs in zip(tokens, run.tokens, strict=True)
    ]
    return Deviation(
        checkpoint=checkpoint.name,
        way=f"{way.name} on {device}",
        equal=None if low else sum(mine == theirs for mine, theirs in pairs),
        tokens=None if low else len(pairs),
        entropy=size([d for ds in differences for d in ds], low=low),
        peer=size(beside, low=low),
        steps=sum(len(ds) for ds in differences),
    )


def entropies(trace: Trace, run: OracleRun) -> list[np.ndarray]:
    """[L] nats by step, ours less the truth's, of all steps with equal input."""
    found = []
    for ours, theirs in zip(trace.canvases, run.canvases, strict=False):
        for mine, step in zip(ours.steps, theirs.steps, strict=False):
            if mine.start != step.start or mine.input_crc != checksum(step.canvas.numpy()):
                return found
            found.append(mine.entropy - step_entropy(step))
    return found


def step_entropy(step: OracleStep) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[L] nats."""
    log_prob = (step.logits.double() / step.temperature).log_softmax(-1)
    entropy: np.ndarray[Any, np.dtype[np.float64]] = -(log_prob.exp() * log_prob).sum(-1).numpy()
    return entropy


def size(differences: Sequence[np.ndarray], *, low: bool) -> float | None:
    """Of all of them together, see the top."""
    if not differences:
        return None
    every = np.concatenate(differences)
    return float(np.sqrt(np.mean(every**2)) if low else np.abs(every).max())


def report(found: Sequence[Deviation], file: Path | None) -> None:
    """Print the table and the headline."""
    rows = [
        {
            "checkpoint": d.checkpoint,
            "way": d.way,
            "equal tokens": None if d.tokens is None else f"{d.equal}/{d.tokens}",
            "steps": d.steps or None,
            "entropy": None if d.entropy is None else f"{d.entropy:.1e}",
            "Transformers here": None if d.peer is None else f"{d.peer:.1e}",
        }
        for d in found
    ]
    _report.print_table(rows)
    flat: dict[str, _report.Value] = {
        f"{d.checkpoint}.{d.way}.{name}": value
        for d in found
        for name, value in asdict(d).items()
        if name not in {"checkpoint", "way"}
    }
    equal, tokens = (sum(getattr(d, name) or 0 for d in found) for name in ("equal", "tokens"))
    _report.finish(flat, f"{equal} of {tokens} tokens are Transformers'", file)


if __name__ == "__main__":
    main()
