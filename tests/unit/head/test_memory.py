"""What a step's head holds at its highest, at the real vocabulary: the budget, not the batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys
from pathlib import Path
import torch
from vllm_diffusion.head import native
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary
from vllm_diffusion.records import Noise

def held(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 1024

rows, kind, vocab, hidden = int(sys.argv[1]), sys.argv[2], 262144, 16
torch.manual_seed(0)
embedding, states = torch.randn(vocab, hidden), torch.randn(rows, hidden)
whole = ReferenceHead(
    logits=lambda h: h @ embedding.T, soft_embedding=lambda p: p @ embedding, max_rows=256
)
vocabulary = Vocabulary(output=embedding, embedding=embedding, size=vocab, softcap=30.0)
head = StreamingHead(vocabulary=vocabulary, whole=whole, budget=64 << 20)
if kind == "torch":
    native.library = lambda: None
if kind == "reference":
    head = whole
def call(rows):
    counter = torch.arange(rows)
    noise = Noise(seed=torch.ones(rows, 2, dtype=torch.int64), position=counter, step=counter * 0)
    head(states[:rows], torch.full((rows,), 0.6), noise)
call(2)
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
call(rows)
print(held("VmHWM") - before)
"""


def extra_mb(rows: int, kind: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(rows), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("rows", [256, 4096])
def test_a_step_stays_within_its_budget(rows: int, kind: str) -> None:
    # The rest is the libraries' own and what is O(rows * hidden), here 16 wide.
    assert extra_mb(rows, kind) <= 64 + 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
def test_the_measure_sees_tensors_over_the_vocabulary() -> None:
    assert extra_mb(256, "reference") > 256 * 262144 * 4 / 2**20
