"""The published speed benchmark of the released checkpoint, ours and native vLLM alternating.

    python benchmarks/recipe.py CHECKPOINT [--rounds 3] [--json FILE]

    recipe     1024 random tokens in, 1024 out, end of sequence ignored, 16 steps a canvas, a
               confidence threshold of 0, which no canvas reaches; one request at a time. So were
               the published figures made that stand beside it
    adaptive   three questions, canvases that end by the checkpoint's own rule; ours under each
               preset. Tokens count up to the end of the turn

Both engines have the same options and stand side by side, each with half of the memory, if it holds
the weights twice; else they start anew for every round. They take turns, and who begins a round
changes. One request of each kind warms an engine up.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import _report
from _native_host import has_gpu, use_stand_ins
from _trained import Worker
from engine import environment_of

from vllm_diffusion.denoise.presets import preset_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PUBLISHED = {("H100", "FP8"): 1008.0, ("H200", "FP8"): 1288.0, ("5090", "NVFP4"): 700.0}
"""Tokens/s by a part of the GPU's name and the form of the weights: vLLM's blog of 2026-06-10, and
the vendor's claim for the RTX 5090."""

QUESTIONS = (
    "Write a Python function that merges two sorted lists, with a docstring and three tests.",
    "Explain to a curious twelve-year-old why the sky is blue and sunsets are red.",
    "List ten European capitals with country and population as a JSON array, nothing else.",
)
JUDGED = ("reference", *(name for name in preset_names() if name not in {"reference", "gentle"}))
PHASES = ("recipe", "adaptive")
STEPS = 16
SPARE = 6 * 2**30
"""Bytes an engine takes beside its weights, of a request or four."""
USABLE = 0.92
"""Of a GPU's memory, as vLLM takes by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a process of one engine runs."""

    checkpoint: str
    phase: str
    generation_config: str
    memory: float
    """Share of the GPU's that it may take."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One arm in one round."""

    seconds: float
    tokens: int
    forwards: float
    """After the prompt's."""


def main() -> None:
    """Run both phases and print them."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("checkpoint", help="a folder or a name on the hub")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    arguments.add_argument("--worker", help="internal: run one engine here")
    options = arguments.parse_args()
    if options.worker:
        run_engine(options.checkpoint, Plan(**json.loads(options.worker)))
        return
    engines = ("ours", "native" if has_gpu() else "native-standin")
    checkpoint = folder_of(options.checkpoint)
    found: dict[tuple[str, str], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        for phase in options.phases:
            apart, memory = shares(checkpoint)
            plan = Plan(
                checkpoint=str(checkpoint),
                phase=phase,
                generation_config=recipe_config(checkpoint, name) if phase == "recipe" else "auto",
                memory=memory,
                prompt_tokens=64 if options.quick else 1024,
                new_tokens=64 if options.quick else 1024,
            )
            for arm, measured in in_turn(engines, plan, options.rounds, apart=apart):
                found.setdefault((phase, arm), []).append(measured)
    report(found, checkpoint, options.json)


def folder_of(checkpoint: str) -> Path:
    """The checkpoint's files on this host, downloaded if they are not here."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint).absolute()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint))


def shares(checkpoint: Path) -> tuple[bool, float]:
    """Whether the engines run one after the other, and the part of the memory each may take."""
    told = _report.gpu().get("gpu.memory.total")
    if told is None:
        return False, USABLE
    total = int(str(told).split()[0]) * 2**20
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    apart = 2 * (weights + SPARE) > USABLE * total
    return apart, USABLE if apart else USABLE / 2


def recipe_config(checkpoint: Path, folder: str) -> str:
    """A folder whose generation config is the checkpoint's with the recipe's two constants."""
    constants = json.loads((checkpoint / "generation_config.json").read_text())
    constants |= {"max_denoising_steps": STEPS, "confidence_threshold": 0.0}
    Path(folder, "generation_config.json").write_text(json.dumps(constants))
    return folder


def in_turn(
    engines: Sequence[str], plan: Plan, rounds: int, *, apart: bool
) -> Iterator[tuple[str, Measured]]:
    """Every arm of every engine, round by round."""

    def start(engine: str) -> Worker:
        environment = environment_of(engine)
        if has_gpu():  # an engine of its own process, as `vllm serve` has it
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        return Worker(engine, ["--worker", json.dumps(asdict(plan))], environment, __file__)

    standing: dict[str, Worker] = {}
    lost: set[str] = set()
    with ExitStack() as running:
        for number, engine in turns(engines, rounds):
            if engine in lost:
                continue
            try:
                with ExitStack() as alone:
                    if (worker := standing.get(engine)) is None:
                        worker = (alone if apart else running).enter_context(start(engine))
                        standing |= {} if apart else {engine: worker}
                    measured = worker.ask(number)
            except SystemExit as failure:
                # The other one's numbers are worth having, beside the published ones at least.
                print(failure, file=sys.stderr)
                lost.add(engine)
                continue
            for arm, fields in measured.items():
                yield arm, Measured(**fields)


def turns(engines: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Who works when: every engine once a round, and the other one first in the next."""
    for number in range(rounds):
        for engine in engines[:: 1 if number % 2 == 0 else -1]:
            yield number, engine


def run_engine(engine: str, plan: Plan) -> None:
    """Run all arms of one engine as often as a line of the input asks for it."""
    # What the engine's libraries print is not among the results.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if engine == "native-standin":
        use_stand_ins()
    from vllm import LLM

    on_gpu = has_gpu()
    llm = LLM(
        plan.checkpoint,
        generation_config=plan.generation_config,
        max_model_len=max(plan.prompt_tokens, 256) + plan.new_tokens,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=(2048 if on_gpu else 64) << 20,
        gpu_memory_utilization=plan.memory,
        enforce_eager=not on_gpu,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    kind = "forwards" if engine == "ours" else "num_denoising_steps"

    def forwards() -> float:
        name = f"vllm:diffusion_{kind}"
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)

    arms = {engine: {}} if engine != "ours" or plan.phase == "recipe" else presets()
    for options in arms.values():
        ask(llm, plan, -1, options)
    print(json.dumps("ready"), file=results)
    for line in sys.stdin:
        found = {}
        for arm, options in arms.items():
            before, started = forwards(), time.perf_counter()
            tokens = ask(llm, plan, int(line), options)
            seconds = time.perf_counter() - started
            measured = Measured(seconds=seconds, tokens=tokens, forwards=forwards() - before)
            found[arm] = asdict(measured)
        print(json.dumps(found), file=results)


def presets() -> dict[str, dict[str, Any]]:
    """The arms of ours where canvases end by their rule."""
    return {f"ours, {preset}": {"diffusion_preset": preset} for preset in JUDGED}


def ask(llm: Any, plan: Plan, number: int, options: Mapping[str, Any]) -> int:  # noqa: ANN401
    """Tokens that one request, or one request after the other, is answered with."""
    from vllm import SamplingParams

    recipe = plan.phase == "recipe"
    sampling = SamplingParams(
        max_tokens=plan.new_tokens, ignore_eos=recipe, extra_args=dict(options) or None
    )
    if recipe:
        import torch

        generator = torch.Generator().manual_seed(1 + number)
        size = llm.llm_engine.model_config.get_vocab_size()
        ids = torch.randint(20, size - 20, (plan.prompt_tokens,), generator=generator).tolist()
        outputs = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    else:
        outputs = [
            output
            for question in QUESTIONS
            for output in llm.chat(
                [{"role": "user", "content": question}], sampling, use_tqdm=False
            )
        ]
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def form_of(config: Mapping[str, Any]) -> str:
    """What the weights are: bf16, FP8, NVFP4, or what the checkpoint calls it."""
    packed = config.get("quantization_config")
    if packed is None:
        return "bf16"
    said = json.dumps(packed).lower()
    known = {"nvfp4": "NVFP4", "float-quantized": "FP8", "fp8": "FP8"}
    return next(
        (form for word, form in known.items() if word in said), str(packed.get("quant_method"))
    )


def published_for(gpu: str, form: str) -> float | None:
    """Tokens/s of the recipe, where a figure of this GPU and form was published."""
    return next((v for (name, f), v in PUBLISHED.items() if name in gpu and f == form), None)


def report(
    found: Mapping[tuple[str, str], Sequence[Measured]], checkpoint: Path, file: Path | None
) -> None:
    """Print a row for every arm and the headline."""
    form = form_of(json.loads((checkpoint / "config.json").read_text()))
    published = published_for(str(_report.gpu().get("gpu.name", "")), form)
    speeds = {key: [m.tokens / m.seconds for m in runs] for key, runs in found.items()}
    native = {p: median(s) for (p, arm), s in speeds.items() if arm.startswith("native")}
    rows, flat = [], {"form": form, "published": published}
    for (phase, arm), runs in found.items():
        own = speeds[phase, arm]
        figures = {
            "tokens_per_s": median(own),
            "slowest": min(own),
            "fastest": max(own),
            "rounds": len(own),
            "tokens_per_forward": sum(m.tokens for m in runs) / sum(m.forwards for m in runs),
            "of_native": median(own) / native[phase] if phase in native else None,
        }
        rows.append(
            {
                "phase": phase,
                "arm": arm,
                "tokens/s": figures["tokens_per_s"],
                "spread": f"{min(own):.4g}..{max(own):.4g}",
                "tokens/forward": figures["tokens_per_forward"],
                "of native": figures["of_native"],
                "published": published if phase == "recipe" else None,
            }
        )
        flat.update({f"{phase}.{arm}.{name}": value for name, value in figures.items()})
    _report.print_table(rows)
    ours = flat.get("recipe.ours.tokens_per_s") or float("nan")
    beside = (
        f"published {published:.0f}" if published else "nothing published for this GPU and form"
    )
    _report.finish(flat, f"the recipe, {form}: {ours:.0f} tokens/s, {beside}", file)


if __name__ == "__main__":
    main()
