"""Whether a seed determines the tokens: random requests in different batches, token by token.

    python benchmarks/determinism.py [--n N] [--seed N] [--steps N]
        [--checkpoint trained|random|DIR] [--quick] [--json FILE]

Draws requests with any mix of parameters, each with its own seed, over chats with common prefixes,
and runs them on engines that batch differently: alone and in order with separate commits; three at
once, shuffled, with chunked prompts and the prefix cache; sixteen at once, shuffled. Commits are
fused in the last two.
Every token is compared with that of the first engine. The generator is that of the tests
(tests/helpers/random_requests.py).

    trained   examples/tiny-diffusiongemma
    random    random weights, self-conditioning damped as in the parity tests: an undamped random
              model doubles a rounding error with every step, even in Transformers alone
"""
# ruff: noqa: ANN401 - vLLM's and argparse's objects are not type-checked

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report

# The generator is the tests' own.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helpers.random_requests import Way

    Tokens = list[list[list[int]]]
    """Of every answer to every request."""

TRAINED = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
LONGEST_PROMPT = 300


def main() -> None:
    """Answer everything in every way, and print what differs."""
    parser = _report.parser(__doc__)
    parser.add_argument("--n", type=int, default=1000, help="requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="most denoising steps of a canvas")
    parser.add_argument("--checkpoint", default="trained")
    options = parser.parse_args()
    if options.quick:
        options.n = min(options.n, 60)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from helpers.random_requests import WAYS

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(options.checkpoint, Path(folder))
        made = [answer(checkpoint, way, options) for way in WAYS]
    report(WAYS, made, options)


def checkpoint_of(name: str, folder: Path) -> Path:
    """The checkpoint of that name, made in the folder if it is a random one."""
    if name != "random":
        return TRAINED if name == "trained" else Path(name)
    from helpers.parity import conditioned_checkpoint

    return conditioned_checkpoint(folder)


def answer(checkpoint: Path, way: Way, options: Any) -> tuple[Tokens, float]:
    """Tokens of all requests, and the seconds they took."""
    from helpers.random_requests import Shape, draw_requests, tokens_of
    from vllm import LLM

    llm = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        block_size=32,
        **way.options,
    )
    config = llm.llm_engine.model_config
    shape = Shape(
        canvas=config.hf_config.canvas_length,
        vocab=config.get_vocab_size(),
        max_steps=options.steps,
    )
    requests = draw_requests(
        llm.get_tokenizer(), shape, options.n, seed=options.seed, longest=LONGEST_PROMPT
    )
    start = time.perf_counter()
    tokens = tokens_of(llm, way, *requests)
    seconds = time.perf_counter() - start
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return tokens, seconds


def report(ways: Sequence[Way], made: Sequence[tuple[Tokens, float]], options: Any) -> None:
    """A row for each way; every request whose tokens differ is named."""
    first = made[0][0]
    rows, flat = [], {}
    total = 0
    for way, (tokens, seconds) in zip(ways, made, strict=True):
        wrong = [
            number for number, pair in enumerate(zip(tokens, first, strict=True)) if unequal(*pair)
        ]
        total += len(wrong)
        rows.append(
            {
                "max_num_seqs": way.seqs,
                "token budget": way.budget,
                "order": "shuffled" if way.shuffled else "as drawn",
                "prefix cache": "on" if way.cached else "off",
                "commits": "fused" if way.fused else "separate",
                "requests": len(tokens),
                "differing": len(wrong),
                "tokens": sum(len(each) for request in tokens for each in request),
                "differing tokens": sum(unequal(*pair) for pair in zip(tokens, first, strict=True)),
                "seconds": seconds,
            }
        )
        flat |= {f"{way.seqs}.{key.replace(' ', '_')}": value for key, value in rows[-1].items()}
        if wrong:
            print(f"differ at max_num_seqs {way.seqs}: {', '.join(map(str, wrong))}")
    _report.print_table(rows)
    verdict = "every token is the same" if not total else f"{total} answers differ"
    headline = f"{options.n} random requests, {options.checkpoint} checkpoint: {verdict}"
    _report.finish(flat, headline, options.json)


def unequal(one: list[list[int]], other: list[list[int]]) -> int:
    """Tokens that differ between the answers to one request."""
    return sum(
        a != b
        for ours, theirs in zip_longest(one, other, fillvalue=[])
        for a, b in zip_longest(ours, theirs)
    )


if __name__ == "__main__":
    main()
