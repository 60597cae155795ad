"""The requests of the tensor-parallel tests, and a program that answers them on some ranks.

    python -m helpers.ranks CHECKPOINT RANKS [ASKED]

prints the tokens of every answer on a line of its own, a list of lists in JSON. Ranks live in
processes that start with what this one was started with, so they cannot be a test's own:
`together` starts the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from helpers.regimes import Asked, ask, tokens_of

OPTIONS: dict[str, Any] = {"max_model_len": 256}


def answers(llm: LLM, adapter: str = "") -> list[list[int]]:
    """Tokens of plain requests, with every wish, constrained; every second through the adapter."""
    prompts = ["hello world", "the quick brown fox jumps over the lazy dog"]
    common: dict[str, Any] = {"max_tokens": 64, "ignore_eos": True, "seed": 1}
    soft = {"diffusion_soft_embedding_top_k": 8}
    asked = [
        SamplingParams(**common),
        SamplingParams(**common),
        SamplingParams(**common, top_p=0.97),
        SamplingParams(**common, top_k=20, min_p=0.001, extra_args=soft),
        # The last one is too large for an automaton: a parser keeps it.
        *(
            SamplingParams(**common, structured_outputs=StructuredOutputsParams(**constraint))
            for constraint in ({"json_object": True}, {"regex": "(a|b)*a(a|b){14}"})
        ),
    ]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(prompts * 3, asked, lora_request=[None, request] * 3, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def together(checkpoint: Path, **asked: Any) -> list[list[int]]:
    """The answers of two ranks.

    Args:
        checkpoint: its folder.
        asked: `adapter` for the requests of `answers`; `greedy` for other ones, prompts with the
            length of their answers; `options` of the engine.
    """
    # Without its own core a rank would wait for the other one's.
    cores = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "helpers.ranks", str(checkpoint), "2", json.dumps(asked)],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the ranks are processes of their own anyway
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # vLLM logs to the same stream, also after this line.
    line = next(line for line in result.stdout.splitlines() if line.startswith("[["))
    said: list[list[int]] = json.loads(line)
    return said


def main(checkpoint: str, ranks: str, asked: str = "{}") -> None:
    """Start an engine and print its answers to what `together` was asked."""
    told = json.loads(asked)
    adapter = told.get("adapter", "")
    llm = LLM(
        checkpoint,
        tensor_parallel_size=int(ranks),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_lora=bool(adapter),
        **(OPTIONS | told.get("options", {})),
    )
    greedy = [Asked(tuple(prompt), length) for prompt, length in told.get("greedy", [])]
    print(json.dumps(tokens_of(ask(llm, greedy)) if greedy else answers(llm, adapter)))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
