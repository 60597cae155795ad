"""`vllm-diffusion tune MODEL --task FILE`: try decoding rules on a task, print score and cost.

Only ``run`` imports torch and vLLM: the command line and `doctor` must work where they cannot be
imported.
"""

from __future__ import annotations

import argparse
import json
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import ParamsError, TuneError
from vllm_diffusion.tune.screen import screen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vllm_diffusion.tune.answers import Answerer
    from vllm_diffusion.tune.compare import Outcome
    from vllm_diffusion.tune.items import TaskItem, Verifier
    from vllm_diffusion.tune.screen import Screen

SUMMARY: Final = "find the decoding rule with the fewest forwards that keeps a task's quality"

_SEARCHABLE: Final = 4  # items: two to search on, so that there is a standard error, two to confirm

_HEADER: Final = (
    f"{'score %':>8}{'difference':>15}{'finished':>10}{'empty':>7}{'steps':>7}{'p90':>6}"
    f"{'TPF_all':>9}  rule"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", help="checkpoint, as `vllm serve` takes it")
    parser.add_argument(
        "--task",
        required=True,
        metavar="FILE",
        help='JSON lines: {"prompt": text or messages, "answer": anything, "max_tokens": N}',
    )
    parser.add_argument(
        "--verifier",
        default="exact",
        help="exact, contains, json, or FILE.py:FUNCTION, which takes (text, item) and returns 0 "
        "to 1 (default: exact)",
    )
    parser.add_argument(
        "--arm",
        action="append",
        metavar="RULE",
        help="a preset, or constants: preset=fast,entropy_bound=0.3; repeatable, the first is the "
        "baseline (default: every preset, `reference` first)",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="then search this many rounds on one half of the items, halving and doubling one "
        "constant of the best rule at a time, and confirm on the other half (default: 0)",
    )
    parser.add_argument("--n", type=int, help="use only the first N items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=512, help="for items without a limit")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="points of score that may be lost beyond the standard error (default: 0)",
    )
    parser.add_argument(
        "--engine",
        type=_object,
        default={},
        metavar="JSON",
        help='arguments of LLM(), such as {"max_model_len": 4096}',
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show the engine's log; write no log file",
    )


def run(options: argparse.Namespace) -> int:
    """Tune; 2 if the input is invalid or the engine does not start, 130 if interrupted."""
    try:
        items, verifier, arms = _read(options)
        with screen(verbose=options.verbose) as shown:
            _tune(options, items, verifier, arms, shown)
    except (TuneError, ParamsError) as error:
        print(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    return 0


def _read(
    options: argparse.Namespace,
) -> tuple[list[TaskItem], Verifier, list[dict[str, Any]]]:
    """Items, verifier and arms; checks everything that can be checked without an engine."""
    from vllm_diffusion.denoise.presets import preset_names
    from vllm_diffusion.tune.arms import parse_arm
    from vllm_diffusion.tune.items import load_items, load_verifier

    if options.search < 0 or (options.n is not None and options.n < 1) or options.max_tokens < 1:
        raise TuneError("--search must be at least 0, --n and --max-tokens at least 1")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise TuneError(
            f"--json {options.json} cannot be written: name a file in an existing folder"
        )
    items = load_items(options.task)[: options.n]
    if options.search and len(items) < _SEARCHABLE:
        raise TuneError(
            f"--search uses half of the items to search and half to confirm: it needs at least "
            f"{_SEARCHABLE}, got {len(items)}"
        )
    verifier = load_verifier(options.verifier)
    return items, verifier, [parse_arm(text) for text in options.arm or preset_names()]


def _tune(
    options: argparse.Namespace,
    items: Sequence[TaskItem],
    verifier: Verifier,
    arms: Sequence[dict[str, Any]],
    shown: Screen,
) -> None:
    """Start an engine and try the arms."""
    log = f"; its log is in {shown.log} (-v shows it here)" if shown.log else ""
    shown.note(f"Starting the engine{log}.")
    with _explained(f"the engine of {options.model} did not start", options, shown):
        # Imported here, since vLLM logs while it is imported.
        from vllm_diffusion.tune.answers import Answerer

        answerer = Answerer(
            options.model,
            verifier,
            engine=options.engine,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
    try:
        with _explained("the run ended early", options, shown):
            told, best = _tried(options, items, arms, answerer, shown)
    finally:
        answerer.close()
    if options.json:
        try:
            options.json.write_text(json.dumps({**told, "best": best}, indent=2) + "\n")
        except OSError as error:
            raise TuneError(f"--json {options.json} cannot be written: {error}") from error


@contextmanager
def _explained(what: str, options: argparse.Namespace, shown: Screen) -> Iterator[None]:
    """Turn any error of vLLM into a short `TuneError`; the log has the rest."""
    from vllm_diffusion.tune.refusal import reason, way_out

    try:
        yield
    except (TuneError, ParamsError):
        raise
    except Exception as error:
        traceback.print_exc()
        told = reason(error, shown.log.read_text(errors="replace") if shown.log else "")
        where = f"The log is in {shown.log}." if shown.log else ""
        parts = [f"{what}: {told}", way_out(told, options.engine), where]
        raise TuneError("\n".join(filter(None, parts))) from error


def _tried(
    options: argparse.Namespace,
    items: Sequence[TaskItem],
    arms: Sequence[dict[str, Any]],
    answerer: Answerer,
    shown: Screen,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All figures, and the options of the recommended rule."""
    from vllm_diffusion.request.options import PREFIX
    from vllm_diffusion.tune.arms import neighbours

    curve = _Curve(answerer, items[::2] if options.search else items, options.tolerance, shown)
    curve.extend(arms)
    best = curve.best()
    for _ in range(options.search):
        near = neighbours(curve.arms[best], answerer.rule(curve.arms[best]))
        curve.extend(near, may_be_refused=True)
        if best == (better := curve.best()):
            break
        best = better
    told, baseline = {"tried": curve.figures()}, next(iter(curve.arms))
    arm = curve.arms[best]
    if options.search and best != baseline:
        # The best of many is partly luck; on the other items it is compared with the baseline only.
        other = _Curve(answerer, items[1::2], options.tolerance, shown)
        other.extend([curve.arms[baseline], arm])
        told["confirmed"] = other.figures()
        arm = other.arms[other.best()]
    # The arm was tried on top of the engine's own options.
    served = {**_ours(options.engine), **{n.removeprefix(PREFIX): v for n, v in arm.items()}}
    shown.say(f"\nfor a request:  {json.dumps(arm)}")
    shown.say(f"for the engine: --additional-config '{json.dumps({'diffusion': served})}'")
    return told, arm


class _Curve:
    """Arms on the same items, each printed when it is done; the first is the baseline."""

    def __init__(
        self, answerer: Answerer, items: Sequence[TaskItem], tolerance: float, shown: Screen
    ) -> None:
        self.arms: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[str, list[Outcome]] = {}
        self._answerer = answerer
        self._items = items
        self._tolerance = tolerance
        self._shown = shown
        shown.say(f"\n{len(items)} items\n{_HEADER}")

    def extend(self, arms: Iterable[dict[str, Any]], *, may_be_refused: bool = False) -> None:
        """Try the arms not tried yet; the engine's rule bounds some constants, so it may refuse."""
        from vllm_diffusion.tune.arms import format_arm

        for arm in arms:
            name = format_arm(arm)
            if name in self.arms:
                continue
            try:
                bar = self._shown.bar(name)
                self._outcomes[name] = self._answerer.answer(self._items, arm, bar)
            except TuneError:
                if not may_be_refused:
                    raise
                continue
            self.arms[name] = arm
            self._shown.say(self._row(name))

    def best(self) -> str:
        """The recommended arm, see ``compare.recommend``."""
        from vllm_diffusion.tune.compare import recommend

        return recommend(self._outcomes, baseline=next(iter(self.arms)), tolerance=self._tolerance)

    def figures(self) -> dict[str, Any]:
        """All figures of every arm."""
        from vllm_diffusion.tune.compare import summarise

        return {
            name: {
                "options": arm,
                "items": len(self._items),
                **asdict(summarise(self._outcomes[name])),
                **dict(zip(("difference", "standard_error"), self._difference(name), strict=True)),
            }
            for name, arm in self.arms.items()
        }

    def _difference(self, name: str) -> tuple[float, float]:
        from vllm_diffusion.tune.compare import paired

        return paired(self._outcomes[name], self._outcomes[next(iter(self.arms))])

    def _row(self, name: str) -> str:
        from vllm_diffusion.tune.compare import summarise

        own, (difference, error) = summarise(self._outcomes[name]), self._difference(name)
        shown = f"{difference:+.1f} +- {error:.1f}" if len(self.arms) > 1 else ""
        return (
            f"{own.score:>8.1f}{shown:>15}{own.finished:>10.1f}{own.empty:>7.1f}{own.steps:>7.2f}"
            f"{own.p90:>6.0f}{own.tpf_all:>9.2f}  {name}"
        )


def _ours(engine: Mapping[str, Any]) -> dict[str, Any]:
    """``additional_config["diffusion"]`` of an engine's arguments, already accepted by it."""
    return (engine.get("additional_config") or {}).get("diffusion") or {}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
