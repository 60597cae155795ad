"""What a step's head holds at its highest, at the real vocabulary: the budget, not the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys
from pathlib import Path
import torch
from vllm_diffusion.head import native
from vllm_diffusion.head.output_copy import HEAD_FORMS
from vllm_diffusion.head.reference import COPIES, ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary
from vllm_diffusion.constrain.rewrite import Rewrite, Truncation
from vllm_diffusion.records import Noise

def held(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 1024

rows, kind, vocab, hidden = int(sys.argv[1]), sys.argv[2], 262144, 16
torch.manual_seed(0)
embedding, states = torch.randn(vocab, hidden), torch.randn(rows, hidden)
budget = int(sys.argv[3]) << 20
whole = ReferenceHead(
    logits=lambda h: h @ embedding.T,
    soft_embedding=lambda p: p @ embedding,
    max_rows=rows if kind == "unchunked" else max(1, budget // (COPIES * 4 * vocab)),
)
vocabulary = Vocabulary(output=embedding, embedding=embedding, size=vocab, softcap=30.0)
if kind in HEAD_FORMS:
    vocabulary = vocabulary.copied(kind)
head = StreamingHead(vocabulary=vocabulary, whole=whole, budget=budget)
if kind in ("torch", "classes-torch"):
    native.library = lambda: None
if kind.startswith("reference") or kind == "unchunked":
    head = whole
cut = Truncation(
    min_p=torch.tensor([0.01 if kind == "min_p" else 0.0]),
    top_k=torch.tensor([50 if kind in ("top_k", "classes-cut") else vocab]),
    top_p=torch.tensor([0.95 if "top_p" in kind or "reveal" in kind else 1.0]),
    sorts=kind != "min_p",
)
listed = torch.arange(0, vocab, 64)[None]
class_of = (torch.arange(vocab) % 3000).int()
def call(rows):
    canvas = torch.zeros(rows, dtype=torch.int64)
    rewrite = soft = None
    if "top_" in kind or kind == "min_p":
        rewrite = Rewrite(canvas=canvas, truncation=cut)
    if kind == "reference-reveal":
        bias = torch.tensor([[3]]), torch.tensor([[1.5]])
        rewrite = Rewrite(canvas=canvas, bias=bias, truncation=cut)
    if kind == "allowed":
        rewrite = Rewrite(canvas=canvas, allowed=listed, truncation=cut)
    if kind == "pinned":
        rewrite = Rewrite(canvas=canvas, pinned=torch.arange(rows))
    if kind == "soft":
        soft = torch.full((rows,), 64)
    counter = torch.arange(rows)
    noise = Noise(seed=torch.ones(rows, 2, dtype=torch.int64), position=counter, step=counter * 0)
    if kind == "classes-cut":
        rewrite = Rewrite(canvas=canvas, truncation=cut)
    read = Rows(
        hidden=states[:rows],
        temperature=torch.full((rows,), 0.6),
        noise=noise,
        rewrite=rewrite,
        soft_top_k=soft,
        self_conditioning=kind != "reference-reveal",
        sample_prob=kind == "reference-reveal",
        own_prob=kind == "reference-reveal",
    )
    if "classes" in kind:
        return head.by_class(read, class_of=class_of, num_classes=3000)
    head(read)
call(2)
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
call(rows)
print(held("VmHWM") - before)
"""


def extra_mb(rows: int, kind: str, budget: int = 64) -> float:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(rows), kind, str(budget)],
        # Every tensor gets pages of its own and gives them back. Otherwise the C library keeps what
        # was freed in between, more or less of it from run to run, and that is not the head's.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("native", 256),
        ("native", 1024),
        ("native", 4096),
        ("torch", 256),
        ("torch", 4096),
        ("top_k", 1024),
        ("top_p", 256),
        ("top_p", 1024),
        ("min_p", 256),
        ("allowed", 4096),
        ("pinned", 4096),
        ("soft", 1024),
        ("int8", 1024),
    ],
)
def test_a_step_stays_within_its_budget(rows: int, kind: str) -> None:
    # The rest is the libraries' own and what is O(rows * hidden), here 16 wide.
    assert extra_mb(rows, kind) <= 64 + 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
@pytest.mark.parametrize("kind", ["classes", "classes-torch", "classes-cut"])
def test_so_do_classes_beside_their_answer(kind: str) -> None:
    rows = 250
    answer = rows * 3000 * (4 * 4 + 2 * 8) / 2**20  # and once more, where its parts are joined
    assert extra_mb(rows, kind) <= 64 + 20 + 2 * answer


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
@pytest.mark.parametrize("kind", ["reference", "reference-top_p", "reference-reveal"])
def test_so_does_the_head_that_holds_logits(kind: str) -> None:
    # The served budget: its tensors are so large that the C library gives each its own pages.
    assert extra_mb(100, kind, budget=256) <= 256 + 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory peaks")
def test_the_measure_sees_tensors_over_the_vocabulary() -> None:
    assert extra_mb(256, "unchunked") > 256 * 262144 * 4 / 2**20
