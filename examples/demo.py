"""The main job, end to end: `vllm serve` and `LLM()` on a small DiffusionGemma, as users run them.

    python examples/demo.py [--prompt TEXT] [--checkpoint DIR] [--max-tokens N] [--seed N]

Asks the trained model of `tiny-diffusiongemma/` for a sudoku, sums, an edited text and JSON, first
over HTTP and then in this process. The questions are none that it was trained on.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vllm_diffusion.testing import server
from vllm_diffusion.testing.tasks import Item, held_out_items, solved

CHECKPOINT = Path(__file__).parent / "tiny-diffusiongemma"
STARTED = time.monotonic()
WIDTH = 96  # of a line of an answer

# A user with a GPU and the released checkpoint needs none of these. They keep a CPU host from
# reserving most of its memory for a model of two megabytes.
SMALL = {
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


def main() -> None:
    """Run both halves; a failure of either is the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    options = parse_arguments()
    canvas = json.loads((options.checkpoint / "config.json").read_text())["canvas_length"]
    print(f"checkpoint {options.checkpoint.name}, canvas of {canvas} tokens")
    questions: list[Item | str] = [options.prompt] if options.prompt else held_out_questions()
    request = {"max_tokens": options.max_tokens, "seed": options.seed}
    served = over_http(options.checkpoint, canvas, questions, request)
    if offline(options.checkpoint, canvas, questions, request) != served:
        raise SystemExit("LLM().chat() answered other than vllm serve.")
    print("  the same answers as over HTTP")
    wrong = [
        item.task
        for item, answer in zip(questions, served, strict=True)
        if isinstance(item, Item) and not solved(item, answer)
    ]
    if wrong:
        raise SystemExit(f"Wrong answers: {', '.join(wrong)}.")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve a small DiffusionGemma and talk to it.")
    parser.add_argument("--prompt", help="ask this instead")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args()


def held_out_questions() -> list[Item | str]:
    """One item of four tasks, with answers that can be checked."""
    sizes = {"sudoku": 7, "chain": 12, "edit": 2, "json": 4}
    return [next(held_out_items(task, 1, seed=2, sizes=[size])) for task, size in sizes.items()]


def over_http(
    checkpoint: Path, canvas: int, questions: list[Item | str], request: dict[str, Any]
) -> list[str]:
    """Ask a `vllm serve` subprocess: every question blocking, the last one streamed as well."""
    from openai import OpenAI

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags = [flag.removesuffix("=True") for flag in flags]
    print(f"\nvllm serve {checkpoint.name} {' '.join(flags)}")
    begun = time.monotonic()
    with server.serve(checkpoint, *flags) as running:
        print(f"  ready after {time.monotonic() - begun:.1f} s")
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        create = partial(
            client.chat.completions.create, model=client.models.list().data[0].id, **request
        )
        answers = []
        for question in questions:
            ask(question)
            with measured(canvas, running.metrics):
                text = create(messages=messages(question)).choices[0].message.content or ""
            answers.append(text)
            tell(question, text)

        print("\n  the last one again, streamed")
        pieces = []
        begun = time.monotonic()
        for chunk in create(messages=messages(questions[-1]), stream=True):
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                if not pieces:
                    print(f"  first text {time.monotonic() - STARTED:.1f} s after the start")
                print(f"    {time.monotonic() - begun:5.2f} s  {shown(piece)}")
                pieces.append(piece)
        if "".join(pieces) != answers[-1]:
            raise SystemExit("The streamed answer differs from the blocking one.")
        print("  both answers are the same text")
    return answers


def offline(
    checkpoint: Path, canvas: int, questions: list[Item | str], request: dict[str, Any]
) -> list[str]:
    """Ask `LLM().chat()` in this process, all questions in one batch."""
    print("\nLLM().chat()")
    begun = time.monotonic()
    with log_on_failure():
        from vllm import LLM, SamplingParams

        llm = LLM(str(checkpoint), disable_log_stats=False, **SMALL)
    print(f"  ready after {time.monotonic() - begun:.1f} s")

    def metrics() -> dict[str, float]:
        return {item.name: item.value for item in llm.get_metrics() if hasattr(item, "value")}

    with measured(canvas, metrics):
        outputs = llm.chat(
            [messages(question) for question in questions],
            SamplingParams(**request),
            use_tqdm=False,
        )
    # LLM has no close(), and a process that leaves without this may wait for its engine for ever.
    with log_on_failure():
        llm.llm_engine.engine_core.shutdown()
    return [output.outputs[0].text for output in outputs]


def messages(question: Item | str) -> Any:  # noqa: ANN401 - one of many types of the openai package
    """The question as a conversation."""
    prompt = question.prompt if isinstance(question, Item) else question
    return [{"role": "user", "content": prompt}]


def ask(question: Item | str) -> None:
    """Print a question."""
    if isinstance(question, Item) and question.task == "sudoku":
        print("\n  sudoku")
    else:
        print(f"\n  {messages(question)[0]['content']}")


def tell(question: Item | str, answer: str) -> None:
    """Print an answer, and whether it is right where that can be known."""
    if not isinstance(question, Item):
        print(f"    {shown(answer)}")
        return
    if question.task == "sudoku":
        gaps = question.prompt.removeprefix("sudoku ").replace("0", ".")
        for row, solution in zip(gaps.split("/"), answer.split("/"), strict=False):
            print(f"    {' '.join(row)}   ->   {' '.join(solution)}")
    else:
        print(textwrap.indent(textwrap.fill(answer, WIDTH), "    "))
    print(f"    {'right' if solved(question, answer) else 'WRONG'}")


@contextmanager
def measured(canvas: int, metrics: Callable[[], dict[str, float]]) -> Iterator[None]:
    """Print what vLLM's own counters say about the requests inside the block."""
    before = metrics()
    begun = time.monotonic()
    yield
    seconds = time.monotonic() - begun
    time.sleep(0.2)  # the server publishes its counters just after the answer
    after = metrics()

    def counted(counter: str) -> float:
        key = f"vllm:{counter}"
        return after.get(key, 0.0) - before.get(key, 0.0)

    tokens = counted("generation_tokens")
    committed = counted("diffusion_num_committed_tokens")
    forwards = counted("diffusion_num_denoising_steps")  # every forward after the prompt's
    print(
        f"    {tokens:.0f} tokens in {committed / canvas:.1f} canvases, "
        f"{forwards:.0f} forwards, {tokens / max(forwards, 1):.2f} tokens per forward, "
        f"{tokens / seconds:.0f} tokens/s"
    )


@contextmanager
def log_on_failure() -> Iterator[None]:
    """Hold back what this process and its children log, and print it only if the block fails."""
    with tempfile.TemporaryFile() as log:
        streams = {stream: os.dup(stream) for stream in (1, 2)}
        sys.stdout.flush()
        for stream in streams:
            os.dup2(log.fileno(), stream)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(streams[2], log.read())
            raise
        finally:
            sys.stdout.flush()
            for stream, original in streams.items():
                os.dup2(original, stream)
                os.close(original)


def shown(text: str) -> str:
    """Make `text` fit a line of a terminal, whatever bytes a random model wrote."""
    printable = "".join(letter if letter.isprintable() else "·" for letter in text)
    return printable if len(printable) <= WIDTH else printable[: WIDTH - 3] + "..."


if __name__ == "__main__":
    main()
