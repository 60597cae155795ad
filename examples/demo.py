"""The main job, end to end: `vllm serve` and `LLM()` on a small DiffusionGemma, as users run them.

    python examples/demo.py [--checkpoint DIR] [--max-tokens N] [--prompt TEXT] [--seed N]

Without a checkpoint it makes one with random weights (once, two megabytes): what it writes is
noise, how it is written is the real thing.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vllm_diffusion.testing import server, tiny_checkpoint

WIDTH = 80  # of a line of the answer
STARTED = time.monotonic()
CACHE = Path(__file__).resolve().parents[1] / ".cache"

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
    checkpoint = options.checkpoint or random_checkpoint()
    canvas = json.loads((checkpoint / "config.json").read_text())["canvas_length"]
    print(f"checkpoint {checkpoint}, canvas of {canvas} tokens")
    request = {
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        # Random weights put an end of turn anywhere; several canvases show more than one.
        "ignore_eos": options.checkpoint is None,
    }
    print(
        f"prompt     {options.prompt!r}, at most {options.max_tokens} tokens, seed {options.seed}"
    )
    over_http(checkpoint, canvas, dict(request))
    offline(checkpoint, canvas, request)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve a small DiffusionGemma and talk to it.")
    parser.add_argument("--checkpoint", type=Path, help="default: one with random weights")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args()


def random_checkpoint() -> Path:
    """Make the checkpoint, or find the one made before by the same code."""
    sources = sorted(Path(tiny_checkpoint.__file__).parent.glob("tiny_*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    checkpoint = CACHE / f"random-diffusiongemma-{digest[:12]}"
    if not checkpoint.exists():
        unfinished = tiny_checkpoint.make_tiny_checkpoint(f"{checkpoint}.{os.getpid()}")
        unfinished.rename(checkpoint)
    return checkpoint


def over_http(checkpoint: Path, canvas: int, request: dict[str, Any]) -> None:
    """Ask a `vllm serve` subprocess, blocking and streamed."""
    from openai import OpenAI

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags = [flag.removesuffix("=True") for flag in flags]
    print(f"\nvllm serve {checkpoint.name} {' '.join(flags)}")
    begun = time.monotonic()
    with server.serve(checkpoint, *flags) as running:
        print(f"  ready after {time.monotonic() - begun:.1f} s")
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        body = {"ignore_eos": request.pop("ignore_eos")}  # vLLM's own field, not OpenAI's
        create = partial(client.chat.completions.create, model=model, extra_body=body, **request)

        with measured("blocking", canvas, running.metrics):
            answer = create().choices[0].message.content
        print(f"    {shown(answer)}")

        pieces = []
        with measured("streamed", canvas, running.metrics):
            begun = time.monotonic()
            for chunk in create(stream=True):
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    if not pieces:
                        print(f"  first text {time.monotonic() - STARTED:.1f} s after the start")
                    print(f"    {time.monotonic() - begun:5.2f} s  {shown(piece)}")
                    pieces.append(piece)
        if "".join(pieces) != answer:
            raise SystemExit("The streamed answer differs from the blocking one.")
        print("  both answers are the same text")


def offline(checkpoint: Path, canvas: int, request: dict[str, Any]) -> None:
    """Ask `LLM().chat()` in this process."""
    print("\nLLM().chat()")
    begun = time.monotonic()
    with log_on_failure():
        from vllm import LLM, SamplingParams

        llm = LLM(str(checkpoint), disable_log_stats=False, **SMALL)
    print(f"  ready after {time.monotonic() - begun:.1f} s")

    def metrics() -> dict[str, float]:
        return {item.name: item.value for item in llm.get_metrics() if hasattr(item, "value")}

    messages = request.pop("messages")
    with measured("chat", canvas, metrics):
        answer = llm.chat(messages, SamplingParams(**request), use_tqdm=False)[0].outputs[0].text
    print(f"    {shown(answer)}")
    # LLM has no close(), and a process that leaves without this may wait for its engine for ever.
    with log_on_failure():
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def measured(name: str, canvas: int, metrics: Callable[[], dict[str, float]]) -> Iterator[None]:
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
        f"  {name:9s} {tokens:.0f} tokens in {committed / canvas:.1f} canvases, "
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
