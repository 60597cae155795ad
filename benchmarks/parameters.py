"""How every request parameter is handled by this plugin and by vLLM's own DiffusionGemma.

    python benchmarks/parameters.py [--checkpoint DIR] [--json FILE]

Both engines get the same requests on the same checkpoint, each in a process of its own. A
parameter is

    honoured   if the answer shows its effect: a length, a set of tokens, the same tokens under
               other noise; or, if nothing more specific is promised, tokens other than without it
    ignored    if it was accepted and shows no effect
    refused    if the request was answered with an error; the errors stand below the table

Native runs with the plugin off, on our stand-ins for the Triton kernels that a CPU host cannot run.
Its noise is torch's, set before every request; ours is keyed by the request's seed. `--quick`
changes nothing: there is nothing to leave out.
"""
# ruff: noqa: ANN401 - vLLM's objects are not type-checked

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import _report
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINES = ("ours", "native")
CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
CANVAS: Final = 64
STEPS: Final = 12
"""Of a canvas, to be quick; both engines take it from the request."""
LENGTH: Final = 2 * CANVAS - 8

# The first leaves the colour open, the others are like nothing the model was trained on: answers
# that parameters can change.
QUESTIONS: Final = (
    "paint rain rope moon star fish bird gold",
    "sum z9 y9 x9 w9 v9 u9 t9 s9 r9 q9 p9",
    "Tell me a story about rain and rope.",
)


def main() -> None:
    """Ask both engines and print them side by side."""
    parser = _report.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--worker", choices=ENGINES, help="internal: run one engine here")
    parser.add_argument("--answers", type=Path, help="internal")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.checkpoint, options.answers)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            engine: measure(engine, options.checkpoint, Path(folder, f"{engine}.json"))
            for engine in ENGINES
        }
    errors: dict[str, int] = {}

    def cell(said: str) -> str:
        verdict, _, error = said.partition(": ")
        return f"{verdict} ({errors.setdefault(error, len(errors) + 1)})" if error else verdict

    rows = [
        {
            "parameter": name,
            "here": cell(found["ours"][name]),
            "native": cell(found["native"][name]),
        }
        for name in CASES
    ]
    _report.print_table(rows)
    for error, number in errors.items():
        print(f"({number}) {error}")
    counts = {
        engine: {
            kind: sum(said.startswith(kind) for said in found[engine].values())
            for kind in ("honoured", "ignored", "refused", "the engine ended")
        }
        for engine in ENGINES
    }
    headline = "; ".join(
        f"{engine}: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        for engine, kinds in counts.items()
    )
    flat = {f"{engine}.{name}": said for engine in ENGINES for name, said in found[engine].items()}
    _report.finish(flat, headline, options.json)


def measure(engine: str, checkpoint: Path, file: Path) -> dict[str, str]:
    """Run all cases on one engine in a process of its own."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its noise is that process's
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_DIFFUSION": "1" if engine == "ours" else "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if engine == "native":
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TORCHDYNAMO_DISABLE": "1"}
    arguments = ["--worker", engine, "--checkpoint", str(checkpoint), "--answers", str(file)]
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=1800,
    )
    if result.returncode:
        sys.exit(f"{engine} failed with status {result.returncode}")
    answers: dict[str, str] = json.loads(file.read_text())
    return answers


def work(name: str, checkpoint: Path, file: Path) -> None:
    """Run every case here and leave the verdicts in the file."""
    if name == "native":
        from _native_host import use_stand_ins

        use_stand_ins()
    from vllm.exceptions import VLLMValidationError

    engine = Engine(checkpoint, keyed=name == "ours")
    found = {}
    ended = None
    for case, seen in CASES.items():
        if ended is None:
            try:
                found[case] = "honoured" if seen(engine) else "ignored"
            except (ValueError, VLLMValidationError) as error:
                found[case] = f"refused: {str(error)[:200]}"
            except AssertionError as error:
                # Nothing that is asked of this engine from here on is answered.
                ended = f"the engine ended: AssertionError {error}"
                found[case] = ended
        else:
            found[case] = f"not asked: {ended}"
    file.write_text(json.dumps(found))


class Engine:
    """Asks the same questions again and again, under noise that is known."""

    def __init__(self, checkpoint: Path, *, keyed: bool) -> None:
        from vllm import LLM

        self.keyed = keyed
        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=4,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 0, "video": 0},
        )
        self.plain = self.tokens()

    def outputs(self, *, noise: int = 1, extra: dict[str, Any] | None = None, **asked: Any) -> Any:
        """A request output for every question.

        Args:
            noise: what the answers depend on besides the request.
            extra: options of ours, without their prefix.
            asked: sampling parameters; a seed of None leaves ours without one.
        """
        from vllm import SamplingParams

        torch.manual_seed(noise)
        if self.keyed:
            asked = {"seed": noise} | asked
        options = {"max_steps": STEPS} | (extra or {})
        sampling = SamplingParams(
            **{"max_tokens": LENGTH, "ignore_eos": True} | asked,
            extra_args={f"diffusion_{name}": value for name, value in options.items()},
        )
        chats: list[Any] = [[{"role": "user", "content": text}] for text in QUESTIONS]
        return self.llm.chat(chats, sampling, use_tqdm=False)

    def answers(self, **asked: Any) -> list[Any]:
        """The first answer to every question."""
        return [output.outputs[0] for output in self.outputs(**asked)]

    def tokens(self, **asked: Any) -> list[list[int]]:
        """Its token ids."""
        return [list(answer.token_ids) for answer in self.answers(**asked)]

    def changes(self, **asked: Any) -> bool:
        """Whether some answer is another than without it."""
        return self.tokens(**asked) != self.plain

    def says_only(self, allowed: set[int], **asked: Any) -> bool:
        """Whether nothing else is in the answers."""
        return all(set(tokens) <= allowed for tokens in self.tokens(**asked))

    def ids(self) -> dict[str, Any]:
        """Tokens that stand in the first plain answer: one early, and its text."""
        token = self.plain[0][5]
        return {"id": token, "text": self.llm.get_tokenizer().decode([token])}


def _temperature_0(engine: Engine) -> bool:
    first, second = (engine.tokens(temperature=0, noise=noise, seed=None) for noise in (1, 2))
    return first == second


def _seed(engine: Engine) -> bool:
    one, again, other = (
        engine.tokens(seed=seed, noise=noise) for seed, noise in ((7, 1), (7, 2), (8, 1))
    )
    return one == again != other


def _n(engine: Engine) -> bool:
    outputs = engine.outputs(n=2)
    different = [len({tuple(answer.token_ids) for answer in each.outputs}) for each in outputs]
    return {len(each.outputs) for each in outputs} == {2} and max(different) == 2


def _min_tokens(engine: Engine) -> bool:
    stop = {"stop_token_ids": [engine.plain[0][5]]}
    return len(engine.tokens(**stop)[0]) < 30 <= len(engine.tokens(**stop, min_tokens=30)[0])


def _bad_words(engine: Engine) -> bool:
    said = engine.ids()
    return said["id"] not in engine.tokens(bad_words=[said["text"].strip()])[0]


def _penalty(engine: Engine, **penalty: float) -> bool:
    # After one step nothing is sure yet, and a small change shows.
    undecided: dict[str, Any] = {"extra": {"max_steps": 1}}
    return engine.tokens(**undecided, **penalty) != engine.tokens(**undecided)


def _ignore_eos(engine: Engine) -> bool:
    short = engine.tokens(ignore_eos=False)
    return min(map(len, short)) < LENGTH == min(map(len, engine.plain))


def _stop(engine: Engine) -> bool:
    whole = engine.answers()[0].text
    return bool(engine.answers(stop=[whole[9:12]])[0].text == whole[: whole.index(whole[9:12])])


def _stop_ids(engine: Engine) -> bool:
    token = engine.ids()["id"]
    return (
        engine.tokens(stop_token_ids=[token])[0]
        == engine.plain[0][: engine.plain[0].index(token) + 1]
    )


def _logprobs(engine: Engine) -> bool:
    return all(
        len(position) in {2, 3} and token in position
        for answer in engine.answers(logprobs=2)
        for token, position in zip(answer.token_ids, answer.logprobs, strict=True)
    )


def _logprob_token_ids(engine: Engine) -> bool:
    return all(
        {30, 31} <= set(position)
        for answer in engine.answers(logprob_token_ids=[30, 31])
        for position in answer.logprobs
    )


def _prompt_logprobs(engine: Engine) -> bool:
    return all(
        len(output.prompt_logprobs) == len(output.prompt_token_ids)
        for output in engine.outputs(prompt_logprobs=1)
    )


def _beam_search(engine: Engine) -> bool:
    from vllm.sampling_params import BeamSearchParams

    (found,) = engine.llm.beam_search(
        [{"prompt_token_ids": [2, 40, 41]}], BeamSearchParams(beam_width=2, max_tokens=2)
    )
    return len(found.sequences) == 2


def _structured_outputs(engine: Engine) -> bool:
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["yes", "no"])
    # Behind the end of a constrained text anything may stand, if a request goes on there.
    answers = engine.answers(structured_outputs=choice, ignore_eos=False)
    return all(each.text in {"yes", "no"} for each in answers)


def _repetition_detection(engine: Engine) -> bool:
    from vllm.sampling_params import RepetitionDetectionParams

    found = RepetitionDetectionParams(max_pattern_size=1, min_pattern_size=1, min_count=2)
    answers = engine.tokens(repetition_detection=found)
    return any(len(tokens) < LENGTH and tokens[-1] == tokens[-2] for tokens in answers)


def _pinned(engine: Engine) -> bool:
    pins = {"seed_canvas": [77] * CANVAS, "pinned": [3, 9]}
    return all(tokens[3] == tokens[9] == 77 for tokens in engine.tokens(extra=pins))


def _read_only(engine: Engine) -> bool:
    return all(len(tokens) == CANVAS for tokens in engine.tokens(extra={"read_only": True}))


def _constrained(engine: Engine) -> bool:
    return engine.says_only(
        {30, 31}, logprob_token_ids=[30, 31], extra={"read_only": True, "constrained": True}
    )


def _confidence(engine: Engine) -> bool:
    # What has to hold for one step only stops where it is believed in, or at once.
    hasty = {"stability_threshold": 0}
    doubted = engine.tokens(extra=hasty)
    return engine.tokens(extra=hasty | {"confidence_threshold": 100.0}) != doubted


def _stability(engine: Engine) -> bool:
    sure = {"confidence_threshold": 100.0}
    held = engine.tokens(extra=sure)
    return engine.tokens(extra=sure | {"stability_threshold": 0}) != held


CASES: Final[dict[str, Callable[[Engine], bool]]] = {
    "temperature 0": _temperature_0,
    "temperature 0.7": lambda engine: engine.changes(temperature=0.7),
    "temperature 2": lambda engine: engine.changes(temperature=2.0),
    "top_p": lambda engine: engine.changes(top_p=0.2),
    "top_k": lambda engine: engine.changes(top_k=1),
    "min_p": lambda engine: engine.changes(min_p=0.5),
    "seed": _seed,
    "beam search": _beam_search,
    "n": _n,
    "min_tokens": _min_tokens,
    "logit_bias": lambda engine: engine.says_only({30}, logit_bias={30: 100.0}),
    "allowed_token_ids": lambda engine: engine.says_only({30, 31}, allowed_token_ids=[30, 31]),
    "bad_words": _bad_words,
    "presence_penalty": lambda engine: _penalty(engine, presence_penalty=2.0),
    "frequency_penalty": lambda engine: _penalty(engine, frequency_penalty=2.0),
    "repetition_penalty": lambda engine: _penalty(engine, repetition_penalty=1.8),
    "max_tokens": lambda engine: {len(t) for t in engine.tokens(max_tokens=5)} == {5},
    "stop": _stop,
    "stop_token_ids": _stop_ids,
    "ignore_eos": _ignore_eos,
    "logprobs": _logprobs,
    "logprob_token_ids": _logprob_token_ids,
    "structured_outputs": _structured_outputs,
    "thinking_token_budget": lambda engine: engine.changes(thinking_token_budget=3),
    "trace_decode_token_ids": lambda engine: engine.says_only(
        {30}, trace_decode_token_ids=[30] * LENGTH
    ),
    "repetition_detection": _repetition_detection,
    "detokenize": lambda engine: {a.text for a in engine.answers(detokenize=False)} == {""},
    "skip_special_tokens": lambda engine: (
        [a.text for a in engine.answers(skip_special_tokens=False)]
        != [a.text for a in engine.answers()]
    ),
    "diffusion_max_steps": lambda engine: engine.changes(extra={"max_steps": 2}),
    "diffusion_canvas_length": lambda engine: engine.changes(extra={"canvas_length": 20}),
    "diffusion_t_min": lambda engine: engine.changes(extra={"t_min": 0.1}),
    "diffusion_t_max": lambda engine: engine.changes(extra={"t_max": 1.5}),
    "diffusion_entropy_bound": lambda engine: engine.changes(extra={"entropy_bound": 9.0}),
    "diffusion_confidence_threshold": _confidence,
    "diffusion_stability_threshold": _stability,
    "diffusion_seed_canvas": lambda engine: engine.changes(extra={"seed_canvas": [77] * CANVAS}),
    "diffusion_pinned": _pinned,
    "diffusion_read_only": _read_only,
    "diffusion_constrained": _constrained,
    # Last: an engine may end with it.
    "prompt_logprobs": _prompt_logprobs,
}


if __name__ == "__main__":
    main()
