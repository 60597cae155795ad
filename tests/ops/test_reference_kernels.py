"""The reference head's kernel for GPUs, in Triton's interpreter, against fp64 and the torch form.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import compiled_for, interpreted, spilled


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("asked", [True, False])
def test_the_kernel_compiles_without_spills(capability: int, asked: bool) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.head import reference_kernels

    kinds = dict.fromkeys(("seeds", "positions", "steps", "tokens"), "*i64")
    kinds |= {"vocab": "i32", "rows": "i32", "greedies": "*i1"}
    constants = {"TILE": 4096, "BLOCK": 4096} | ({} if asked else {"own": None, "greedies": None})
    compiled = compiled_for(
        capability,
        reference_kernels._read_row,
        kinds,
        constants,
        other="*fp32",
        options={"num_warps": 8},
    )
    assert spilled(compiled["ptx"]) == 0


def test_the_kernel_is_the_definition() -> None:
    assert "cases agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    from dataclasses import replace

    import torch
    from helpers.heads import assert_same_tokens, make_case

    from vllm_diffusion.constrain.rewrite import Rewrite
    from vllm_diffusion.head import reference, reference_kernels, sample

    def asked(case):
        return replace(case.rows(), self_conditioning=False, sample_prob=True, own_prob=True)

    def on_kernels(head, rows):
        own = head._own(rows.hidden)
        return reference_kernels.row_statistics(reference._rewritten(own, rows), own, rows)

    def compared(case, banned=()):
        head, truth = replace(case.reference(), banned=banned), case.reference(torch.float64)
        plain, right = head(asked(case)), replace(truth, banned=banned)(asked(case))
        ours = on_kernels(head, asked(case))
        assert ours.soft_embedding is None
        assert_same_tokens(ours, right)
        assert not set(ours.sample.tolist()) & set(banned)
        for name in ("entropy", "top_prob", "margin", "sample_prob", "own_prob"):
            exact = getattr(right, name).double()
            errors = [
                float((getattr(stats, name).double() - exact).square().mean().sqrt())
                for stats in (ours, plain)
            ]
            assert errors[0] <= 2 * errors[1] + 1e-7, (name, errors)

    count = 0
    for tile, vocab, softcap, temperature in (
        (64, 700, 30.0, None),
        (128, 700, None, None),
        (4096, 700, 30.0, None),
        (4096, 4096 + 33, 30.0, None),
        (64, 1, 30.0, None),
        (64, 700, 30.0, 4e-3),
        (64, 700, 30.0, 1e3),
    ):
        sample.TILE = tile
        case = make_case(3, canvases=3, length=4, vocab=vocab, softcap=softcap, hidden=16)
        if temperature is not None:
            case = replace(case, temperature=torch.full_like(case.temperature, temperature))
        compared(case)
        if vocab > 1:
            compared(case, banned=(0, 5, vocab - 1))
        count += 1
    sample.TILE = 64
    for seed in range(3):
        case = make_case(seed, canvases=4, length=4, vocab=300, rewrite=True)
        compared(case)
        rewrite = case.rewrite
        compared(replace(case, rewrite=Rewrite(canvas=rewrite.canvas, greedy=rewrite.greedy)))
        count += 1
    case = make_case(0, canvases=1, length=4, vocab=100)
    case.hidden[3] = torch.nan
    ours = on_kernels(case.reference(), asked(case))
    assert ours.entropy[3].isnan()
    assert 0 <= int(ours.sample[3]) < 100
    assert 0 <= int(ours.argmax[3]) < 100
    whole = asked(case)
    for stats in (
        on_kernels(case.reference(), replace(whole, own_prob=False)),
        on_kernels(case.reference(), replace(whole, sample_prob=False)),
    ):
        assert (stats.own_prob is None) != (stats.sample_prob is None)
    print(count, "cases agree")


if __name__ == "__main__":
    in_the_interpreter()
