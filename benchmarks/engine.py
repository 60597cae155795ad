"""Tokens per second of ours, native vLLM and Transformers on one checkpoint, in one run.

    python benchmarks/engine.py [--quick] [--json FILE]
    python benchmarks/engine.py --trained [--n N] [--quick] [--json FILE]
    python benchmarks/engine.py --size released --steps --engines ours native

Every engine runs in a process of its own, one after the other, with the same threads, the same
prompts and the same number of new tokens, end-of-sequence ignored. The checkpoint has random
weights (`vllm_diffusion.testing.tiny_checkpoint`) and a threshold that no canvas reaches, so that
every canvas takes all its steps in every engine: this measures the engine, not the decoding rule.

    ours           stock vLLM with this plugin
    native         stock vLLM, plugin off. On a CPU host its Triton kernels run in Triton's
                   interpreter: without a Triton CPU backend it does not start at all, so Triton is
                   given one
    native-standin the same with our kernel stand-ins instead of the interpreter: what native would
                   be if vLLM brought CPU versions of those kernels itself
    transformers   DiffusionGemmaForBlockDiffusion.generate on one batch of all requests

Steps per canvas and tokens per forward count every forward after the prompt's, commits included.

`--size released` has the released model's widths; vLLM draws its weights on the device, so that no
gigabytes are written. `--steps` counts, after timing, the syncs, launches and kernels of a
denoising step, see `_step_costs`.

`--trained` measures the decoding rules: on examples/tiny-diffusiongemma, with questions that it was
trained on and canvases that end when their rule says so, under presets of ours, see `_trained`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import _report
import _step_costs
import _trained
from _cell import measure
from _native_host import has_gpu, pretend_triton_has_a_cpu_backend, use_stand_ins

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import (
    RELEASED,
    TinySpec,
    make_tiny_checkpoint,
    make_weightless_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENGINES = ("ours", "native", "native-standin", "transformers")
SIZES = {
    "tiny": TinySpec(max_steps=16),
    "small": TinySpec(
        canvas=64,
        hidden=256,
        layers=6,
        vocab=4096,
        head_dim=64,
        full_head_dim=128,
        intermediate=512,
        experts=8,
        expert_intermediate=256,
        sliding_window=64,
        max_steps=16,
    ),
    "released": replace(RELEASED, max_steps=16),
}
"""0.4 million weights, where a step is all overhead; 15 million, where it computes; and the
released model's widths, its 30 layers cut to 6, one of which is full as every sixth is there."""
COSTS = ("waits", "launches", "kernels", "forward_launches", "step_ms", "busy_ms")
PROMPT = "the quick brown fox jumps over the lazy dog"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every engine runs."""

    checkpoint: str
    canvases: int
    canvas: int
    concurrency: tuple[int, ...]
    repeats: int
    eager: bool
    dtype: str
    load_format: str
    """As vLLM has it; "dummy" draws the weights where they will be."""
    prompt_tokens: int
    """Of a prompt of random ids; 0 for a sentence."""
    steps: bool
    """Count what a denoising step costs, too."""

    @property
    def new_tokens(self) -> int:
        """New tokens of a request."""
        return self.canvases * self.canvas

    def prompt(self, number: int) -> str | dict[str, list[int]]:
        """What the request of this number is asked; no two share a prefix of random ids."""
        if not self.prompt_tokens:
            return PROMPT
        ids = range(self.prompt_tokens)
        return {"prompt_token_ids": [20 + (7919 * at + 104729 * number) % 480 for at in ids]}


@dataclass(frozen=True, slots=True)
class Run:
    """One batch of requests."""

    seconds: float
    tokens: int
    forwards: float
    """Forwards after the prompt's, of an average request."""


def main() -> None:
    """Run every engine and print them side by side."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--size", choices=SIZES, default="small", help="of the checkpoint")
    arguments.add_argument("--layers", type=int, help="of the checkpoint, instead of its size's")
    arguments.add_argument("--weights", choices=("file", "drawn"), help="drawn: by vLLM")
    arguments.add_argument("--steps", action="store_true", help="count what a step costs")
    arguments.add_argument("--engines", nargs="+", choices=ENGINES)
    arguments.add_argument("--trained", action="store_true", help="presets on a trained model")
    arguments.add_argument("--n", type=int, default=20, help="items of each task of --trained")
    arguments.add_argument("--seed", type=int, default=0, help="of the items of --trained")
    arguments.add_argument("--worker", choices=ENGINES, help="internal: run one engine here")
    arguments.add_argument("--plan", help="internal")
    options = arguments.parse_args()
    if options.worker:
        plan = json.loads(options.plan)
        run_engine(options.worker, Plan(**{**plan, "concurrency": tuple(plan["concurrency"])}))
        return
    if options.trained:
        _trained.compare(
            options.engines or ENGINES,
            environment_of,
            quick=options.quick,
            count=options.n,
            seed=options.seed,
            file=options.json,
        )
        return

    spec, released = SIZES[options.size], options.size == "released"
    spec = replace(spec, layers=options.layers or spec.layers)
    drawn = options.weights == "drawn" or (released and options.weights is None)
    with tempfile.TemporaryDirectory() as folder:
        make = make_weightless_checkpoint if drawn else make_tiny_checkpoint
        plan = Plan(
            checkpoint=str(never_settling(make(folder, spec))),
            canvases=1 if options.quick else 3,
            canvas=spec.canvas,
            concurrency=(1, 16) if options.quick else (1, 4, 16),
            repeats=1 if options.quick else 3,
            eager=options.quick,
            dtype=spec.dtype,
            load_format="dummy" if drawn else "auto",
            prompt_tokens=1024 if released else 0,
            steps=options.steps,
        )
        # Quick leaves out the engine that is nobody's: native on our stand-ins.
        engines = options.engines or [
            engine for engine in ENGINES if not (options.quick and engine == "native-standin")
        ]
        results = {engine: measure_engine(engine, plan) for engine in engines}
    report(results, plan, options.json)


def never_settling(checkpoint: Path) -> Path:
    """Let every canvas run to its last step, so that all engines do the same work."""
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "confidence_threshold": 1e-12}))
    return checkpoint


def measure_engine(engine: str, plan: Plan) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    measured: dict[str, Any] = measure(
        __file__,
        *("--worker", engine, "--plan", json.dumps(asdict(plan))),
        environment=environment_of(engine),
        name=engine,
    )
    print(f"{engine}: {measured['start_s']:.0f} s to start", file=sys.stderr)
    return measured


def environment_of(engine: str) -> dict[str, str]:
    """What the process of an engine finds in its environment."""
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # In this process, so that memory and forwards are counted where they happen.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DIFFUSION": "1" if engine == "ours" else "0",
    }
    if engine == "native" and not has_gpu():
        environment["TRITON_INTERPRET"] = "1"
    if engine.startswith("native"):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return environment


def run_engine(engine: str, plan: Plan) -> None:
    """Run the plan on one engine and print the result as one line of JSON."""
    started = time.perf_counter()
    if engine == "native" and not has_gpu():
        pretend_triton_has_a_cpu_backend()
    run = transformers_engine(plan) if engine == "transformers" else VllmEngine(engine, plan)
    start_s = time.perf_counter() - started
    result: dict[str, Any] = {"start_s": start_s}
    for concurrency in plan.concurrency:
        run(concurrency)  # warm up: compilation, allocator, prefix cache
        runs = sorted((run(concurrency) for _ in range(plan.repeats)), key=lambda r: r.seconds)
        median = runs[len(runs) // 2]
        result[str(concurrency)] = {
            "tokens_per_s": median.tokens / median.seconds,
            "fastest": runs[0].tokens / runs[0].seconds,
            "slowest": runs[-1].tokens / runs[-1].seconds,
            "steps_per_canvas": median.forwards / plan.canvases,
            "tokens_per_forward": median.tokens / concurrency / median.forwards,
        }
        if isinstance(run, VllmEngine) and plan.steps:
            result[str(concurrency)] |= asdict(run.step_costs(concurrency))
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


class VllmEngine:
    """Ours or native, through LLM.generate."""

    def __init__(self, engine: str, plan: Plan) -> None:
        if engine == "native-standin":
            use_stand_ins()
        from vllm import LLM

        self._plan = plan
        self._most = max(plan.concurrency)
        # Every canvas in one step, and beside each the commit of the one before.
        rows = {"max_num_batched_tokens": 2 * self._most * plan.canvas} if has_gpu() else {}
        self._llm = LLM(
            plan.checkpoint,
            dtype=plan.dtype,
            load_format=plan.load_format,
            max_model_len=max(1024, plan.prompt_tokens + plan.new_tokens),
            max_num_seqs=self._most,
            enforce_eager=plan.eager,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 0, "video": 0},
            disable_log_stats=False,
            **rows,
        )
        # Native counts a request's commit as a denoising step; ours has both kinds by name.
        kind = "forwards" if engine == "ours" else "num_denoising_steps"
        self._counter = "vllm:diffusion_" + kind

    def __call__(self, concurrency: int) -> Run:
        """So many requests at once."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=self._plan.new_tokens, ignore_eos=True)
        prompts = [self._plan.prompt(number) for number in range(concurrency)]
        before = self._forwards()
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return Run(seconds, tokens, (self._forwards() - before) / concurrency)

    def step_costs(self, canvases: int) -> _step_costs.StepCosts:
        """What a step of so many canvases, none of which ends, asks of the device."""
        prompts = [self._plan.prompt(number) for number in range(canvases)]
        return _step_costs.count(self._llm, prompts, new_tokens=self._plan.new_tokens)

    def _forwards(self) -> float:
        found = (metric for metric in self._llm.get_metrics() if metric.name == self._counter)
        return sum(metric.value for metric in found)


def transformers_engine(plan: Plan) -> Callable[[int], Run]:
    """Transformers' own loop over one static batch."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(plan.checkpoint, dtype=torch.float32)
    model.eval()
    prompt = AutoTokenizer.from_pretrained(plan.checkpoint)(PROMPT, return_tensors="pt").input_ids
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.model.decoder.register_forward_hook(count)

    def run(concurrency: int) -> Run:
        nonlocal calls
        calls = 0
        start = time.perf_counter()
        output = model.generate(
            prompt.expand(concurrency, -1),
            max_new_tokens=plan.new_tokens,
            eos_token_id=None,
            pad_token_id=None,
        )
        seconds = time.perf_counter() - start
        tokens = output.sequences[:, prompt.shape[1] :].numel()
        # The last canvas is never encoded, every other one once.
        return Run(seconds, tokens, calls + plan.canvases - 1)

    return run


def report(results: dict[str, dict[str, Any]], plan: Plan, file: Path | None) -> None:
    """Print the table and the headline ratios."""
    rows = []
    flat: dict[str, _report.Value] = {}
    for concurrency in plan.concurrency:
        for engine, result in results.items():
            cell = result[str(concurrency)]
            rows.append(
                {
                    "requests": concurrency,
                    "engine": engine,
                    "tokens/s": cell["tokens_per_s"],
                    "spread": f"{cell['slowest']:.3g}..{cell['fastest']:.3g}",
                    "steps/canvas": cell["steps_per_canvas"],
                    "tokens/forward": cell["tokens_per_forward"],
                    "peak MB": result["peak_mb"],
                    "ours is": f"{ratio(results, engine, concurrency):.2f}x",
                    **{name: cell.get(name) for name in COSTS if plan.steps},
                }
            )
            flat.update({f"{engine}.{concurrency}.{key}": value for key, value in cell.items()})
    flat.update({f"{engine}.peak_mb": result["peak_mb"] for engine, result in results.items()})
    _report.print_table(rows)
    parts = []
    if "transformers" in results:
        parts.append(f"{ratio(results, 'transformers', 1):.2f}x Transformers at 1 request")
    if "native" in results:
        parts.append(f"{ratio(results, 'native', 16):.2f}x native vLLM at 16")
    _report.finish(flat, "ours: " + ", ".join(parts), file)


def ratio(results: dict[str, dict[str, Any]], engine: str, concurrency: int) -> float:
    """Tokens per second of ours over another engine's."""
    if "ours" not in results:
        return float("nan")
    key = str(concurrency)
    return float(results["ours"][key]["tokens_per_s"] / results[engine][key]["tokens_per_s"])


if __name__ == "__main__":
    main()
