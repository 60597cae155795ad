"""Two ranks write what one writes: sharded layers, a sharded embedding, the same noise on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from helpers.parity import SPEC, conditioned_checkpoint

from vllm_diffusion.head.sample import TILE
from vllm_diffusion.testing.adapters import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], tensor_parallel_size=int(sys.argv[2]), dtype="float32", max_model_len=256,
        enforce_eager=True, kv_cache_memory_bytes=64 << 20, enable_lora=bool(sys.argv[4]),
    )
    adapter = LoRARequest("adapter", 1, sys.argv[4]) if sys.argv[4] else None
    prompts = ["hello world", "the quick brown fox jumps over the lazy dog"]
    common = {"max_tokens": 64, "ignore_eos": True, "seed": 1}
    asked = [
        SamplingParams(**common),
        SamplingParams(**common),
        SamplingParams(**common, top_p=0.97),
        SamplingParams(**common, top_k=20, min_p=0.001, extra_args=json.loads(sys.argv[3])),
        # The last one is too large for an automaton: a parser keeps it.
        *(
            SamplingParams(**common, structured_outputs=StructuredOutputsParams(**constraint))
            for constraint in ({"json_object": True}, {"regex": "(a|b)*a(a|b){14}"})
        ),
    ]
    outputs = llm.generate(prompts * 3, asked, lora_request=[None, adapter] * 3)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]))
    llm.llm_engine.engine_core.shutdown()
"""


def tokens(checkpoint: Path, ranks: int, adapter: str = "") -> list[list[int]]:
    # Without its own core a rank would wait for the other one's.
    cores = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:ranks])
    result = subprocess.run(
        [
            *(sys.executable, "-c", GENERATE, str(checkpoint), str(ranks)),
            *(json.dumps({"diffusion_soft_embedding_top_k": 8}), adapter),
        ],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # vLLM logs to the same stream, also after this line.
    line = next(line for line in result.stdout.splitlines() if line.startswith("[["))
    answer: list[list[int]] = json.loads(line)
    return answer


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("vocab", [SPEC.vocab, 2 * TILE], ids=["half a tile", "a tile a rank"])
def test_two_ranks_write_the_same_tokens_as_one(tmp_path: Path, vocab: int) -> None:
    # Ranks that would cut a tile gather all logits, others exchange statistics alone.
    checkpoint = conditioned_checkpoint(tmp_path, replace(SPEC, vocab=vocab))
    alone, together = tokens(checkpoint, 1), tokens(checkpoint, 2)
    assert together == alone
    assert [len(one) for one in alone] == [64] * 6
    assert len({tuple(one) for one in alone}) == 6


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_ranks_write_the_same_with_an_adapter(tmp_path: Path) -> None:
    checkpoint = conditioned_checkpoint(tmp_path / "checkpoint")
    adapter = str(write_adapter(tmp_path / "adapter", checkpoint, alike=False))
    alone, together = (tokens(checkpoint, ranks, adapter) for ranks in (1, 2))
    assert together == alone
    assert len({tuple(one) for one in alone}) == 6
