"""The forms of the head at a size that takes milliseconds, timed by pytest-benchmark.

    scripts/test tests/ops/test_head_speed.py

`benchmarks/head.py` has the real vocabulary, memory and native vLLM beside ours. Time has no bound
here, which a busy host would break; what each form gives is held to the definition.
"""

from __future__ import annotations

import pytest
import torch
from helpers.classes import assert_tokens, both, classes_of
from helpers.heads import assert_same_tokens, make_case

from vllm_diffusion.head import native

FORMS = ("reference", "torch", "C++")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_the_head(form, dtype, benchmark, monkeypatch):
    if form == "C++" and native.library() is None:
        pytest.skip("the C++ part of the head is not built")
    if form == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    case = make_case(6, canvases=4, length=16, vocab=16384, hidden=64, dtype=dtype)
    head = case.reference() if form == "reference" else case.streaming()
    benchmark.group = f"64 rows of 64, 16384 ids, {dtype}"
    stats = benchmark.pedantic(head, args=(case.rows(),), rounds=5, warmup_rounds=1)
    truth = case.truth()
    if dtype == torch.float32:
        assert_same_tokens(stats, truth)
    else:  # the product rounds its logits: two that are nearly equal may change places
        assert (stats.argmax == truth.argmax).float().mean() > 0.9


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_the_head_by_class(form, count, benchmark, monkeypatch):
    if form == "C++" and native.library() is None:
        pytest.skip("the C++ part of the head is not built")
    if form == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    case = make_case(6, canvases=4, length=16, vocab=16384, hidden=64)
    class_of = classes_of(16384, count=count)
    head = case.reference() if form == "reference" else case.streaming()
    benchmark.group = f"64 rows of 64, 16384 ids, {count} classes"
    _, ours = benchmark.pedantic(
        both, args=(case, head, class_of, count), rounds=3, warmup_rounds=1
    )
    assert_tokens(ours, both(case, case.reference(torch.float64), class_of, count)[1])
