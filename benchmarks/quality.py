"""Quality against number of forwards, the benchmark that decides about decoding rules.

    python benchmarks/quality.py [--preset NAME ...] [--engine NAME ...] [--task NAME ...]
        [--sizes easy|hard|all] [--n N] [--seed N] [--checkpoint DIR] [--plot FILE] [--json FILE]

Every arm (an engine, or a preset of ours) answers the same held-out items of the same tasks, with
the same seeds as far as its engine takes any. The first arm is what the others are compared with,
item by item: `diff` is the difference in points of exact match with its standard error.

    ours:PRESET    this plugin under a preset of `vllm_diffusion/denoise/presets.py`, or under the
                   published rule with other options of a request, `entropy_bound=0.3,t_min=0.2`
                   or `fused_commit=false`; cut-2, cut-4, freeze-0.6 and no-renoise are known to be
                   bad and must be seen to be
    native         vLLM's own DiffusionGemma on our CPU stand-ins for its Triton kernels
    transformers   DiffusionGemmaForBlockDiffusion.generate, one item after the other; of SDAR and
                   LLaDA the dense loop of their definition, on Transformers' decoder

The checkpoint says which family it is of. Only DiffusionGemma has a native arm and the bad rules.

TPF_all counts emitted tokens before the end of the turn, without padding, over every forward after
the prompt's: denoising and committing, one that does both being one. TPF_denoise leaves out those
that only commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
from _answers import Answer, ask_native, ask_ours, ask_transformers
from _bad_rules import BAD_RULES
from _dense import ask_dense
from _native_host import use_stand_ins

from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.testing.tasks import TASKS, Item, held_out_items, solved
from vllm_diffusion.tune.compare import Outcome, paired, repeated_share, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
NAMES = (*preset_names(), *BAD_RULES)
ENGINES = ("ours", "native", "transformers")


def main() -> None:
    """Ask every arm, and print them side by side."""
    parser = _report.parser(__doc__)
    parser.add_argument(
        "--preset",
        action="append",
        type=known_preset,
        metavar="NAME",
        help=f"{', '.join(NAMES)}, or options as name=value,...; of ours; repeatable",
    )
    parser.add_argument("--engine", action="append", choices=ENGINES, help="repeatable")
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
    parser.add_argument("--sizes", choices=("easy", "hard", "all"), default="all")
    parser.add_argument("--n", type=int, default=100, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--plot", type=Path, help="PNG: quality against tokens per forward")
    parser.add_argument("--worker", nargs="+", help="internal: answer with these arms here")
    parser.add_argument("--folder", type=Path, help="internal")
    options = parser.parse_args()
    if options.worker:
        answer_here(options.worker, options.folder, options.checkpoint, options.seed)
        return
    presets = options.preset or ["reference"]
    gemma = family_of(options.checkpoint) == "diffusion_gemma"
    lacking = set() if gemma else {"native", *BAD_RULES}
    every = [name for name in ENGINES if name not in lacking]
    engines = options.engine or (["ours"] if options.preset else every)
    if asked := sorted(lacking & {*presets, *engines}):
        parser.error(f"only DiffusionGemma has {', '.join(asked)}")
    arms = [f"ours:{preset}" for preset in presets if "ours" in engines]
    arms += [engine for engine in engines if engine != "ours"]
    items = [
        item
        for task in options.task or TASKS
        for item in held_out_items(
            task,
            20 if options.quick else options.n,
            seed=options.seed,
            sizes=sizes_of(task, options.sizes),
        )
    ]
    # Ours share an engine, which takes longer to start than to answer.
    ours = [arm for arm in arms if arm.startswith("ours:")]
    parts = [ours] * bool(ours) + [[arm] for arm in arms if arm not in ours]
    results = {arm: made for part in parts for arm, made in measure(part, items, options).items()}
    report(results, items, options)


def family_of(checkpoint: Path) -> str:
    """Model type of a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return str(config["model_type"])


def known_preset(text: str) -> str:
    """The text, if it is the name of a preset or a list of options."""
    if text not in NAMES and "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(NAMES)}, nor options")
    return text


def options_of(preset: str) -> dict[str, Any]:
    """What a request asks for to be denoised under a preset."""
    if preset in BAD_RULES:
        return {}
    if preset in preset_names():
        return {"diffusion_preset": preset}
    named = (constant.partition("=") for constant in preset.split(","))
    return {f"diffusion_{name}": json.loads(value) for name, _, value in named}


def sizes_of(task: str, which: str) -> Sequence[int]:
    """Sizes of a task that training covered, all of them or one end."""
    made = TASKS[task]
    return {"easy": made.easy, "hard": made.hard, "all": made.sizes}[which]


def measure(arms: Sequence[str], items: Sequence[Item], options: Any) -> dict[str, list[Outcome]]:  # noqa: ANN401 - argparse
    """Let a process answer with arms of one engine, and judge what it wrote."""
    native = "native" in arms
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_DIFFUSION": "0" if native else "1",
        **({"VLLM_USE_V2_MODEL_RUNNER": "1"} if native else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "items.json").write_text(json.dumps([asdict(item) for item in items]))
        command = [sys.executable, __file__, "--worker", *arms, "--folder", folder]
        command += ["--checkpoint", str(options.checkpoint), "--seed", str(options.seed)]
        result = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
        if result.returncode:
            sys.exit(f"{', '.join(arms)} failed with status {result.returncode}")
        made = json.loads((Path(folder) / "answers.json").read_text())
    return {
        arm: [judge(item, Answer(**answer)) for item, answer in zip(items, made[arm], strict=True)]
        for arm in arms
    }


def answer_here(arms: Sequence[str], folder: Path, checkpoint: Path, seed: int) -> None:
    """Answer the items of a folder with arms of one engine, into the same folder."""
    items = [Item(**item) for item in json.loads((folder / "items.json").read_text())]
    if arms == ["native"]:
        use_stand_ins()
        made = [ask_native(str(checkpoint), items, seed)]
    elif arms == ["transformers"] and family_of(checkpoint) == "diffusion_gemma":
        made = [ask_transformers(str(checkpoint), items, seed)]
    elif arms == ["transformers"]:
        made = [ask_dense(checkpoint, family_of(checkpoint), items)]
    else:
        presets = [arm.removeprefix("ours:") for arm in arms]
        ways = [(BAD_RULES.get(preset), options_of(preset)) for preset in presets]
        made = ask_ours(str(checkpoint), items, seed, ways)
    answers = {arm: [asdict(answer) for answer in own] for arm, own in zip(arms, made, strict=True)}
    (folder / "answers.json").write_text(json.dumps(answers))


def judge(item: Item, answer: Answer) -> Outcome:
    """Score an answer; one that was cut is wrong even if it starts right."""
    return Outcome(
        score=float(answer.finished and solved(item, answer.text)),
        finished=answer.finished,
        empty=not answer.text.strip(),
        repeated=repeated_share(answer.tokens),
        tokens=len(answer.tokens),
        denoise=sum(answer.steps),
        commits=answer.commits,
        steps=answer.steps,
    )


def report(results: dict[str, list[Outcome]], items: Sequence[Item], options: Any) -> None:  # noqa: ANN401 - argparse
    """Print one row per task and arm, and one over all tasks."""
    rows = []
    flat: dict[str, _report.Value] = {"items": len(items)}
    tasks = list(dict.fromkeys(item.task for item in items))
    baseline = next(iter(results))
    for task in [*tasks, "all"] if len(tasks) > 1 else tasks:
        chosen = [n for n, item in enumerate(items) if task in {item.task, "all"}]
        first = [results[baseline][n] for n in chosen]
        for arm, judged in results.items():
            own = [judged[n] for n in chosen]
            row = figures(own)
            difference, error = paired(own, first)
            shown = "" if arm == baseline else f"{difference:+.1f} +- {error:.1f}"
            rows.append(
                {
                    "task": task,
                    "arm": arm,
                    "exact %": row["exact"],
                    "diff": shown,
                    **{name: value for name, value in row.items() if name != "exact"},
                }
            )
            flat.update({f"{arm}.{task}.{name}": value for name, value in row.items()})
            flat[f"{arm}.{task}.diff"], flat[f"{arm}.{task}.diff_error"] = difference, error
    _report.print_table(rows)
    if options.plot:
        plot({arm: figures(judged) for arm, judged in results.items()}, options.plot)
    last = {arm: figures(judged) for arm, judged in results.items()}
    _report.finish(
        flat,
        "; ".join(
            f"{arm} {row['exact']:.1f} % at {row['TPF_all']:.2f}" for arm, row in last.items()
        ),
        options.json,
    )


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What is known of one arm on some items, by the names of the columns."""
    own = summarise(outcomes)
    return {
        "exact": own.score,
        "finished": own.finished,
        "looped": own.looped,
        "empty": own.empty,
        "steps": own.steps,
        "p50": own.p50,
        "p90": own.p90,
        "TPF_all": own.tpf_all,
        "TPF_denoise": own.tpf_denoise,
    }


def plot(arms: dict[str, dict[str, float]], file: Path) -> None:
    """Draw quality against tokens per forward, one point an arm."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install '.[benchmark]' in a clone")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm, row in arms.items():
        axes.plot(row["TPF_all"], row["exact"], "o")
        axes.annotate(
            arm, (row["TPF_all"], row["exact"]), xytext=(5, 5), textcoords="offset points"
        )
    axes.set(xlabel="tokens per forward, all forwards after the prompt", ylabel="exact match, %")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
