"""The Triton form of the tile epilogue, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import interpreted


@pytest.mark.parametrize("capability", [90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_without_a_gpu(capability: int, dtype: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_diffusion.head import fused

    kinds = {"logits": f"*{dtype}", "softcap": "fp32", "argmaxes": "*i64", "samples": "*i64"}
    kinds |= dict.fromkeys(("stride", "width", "first", "uniform_stride"), "i32")
    constants = {"CAPPED": True, "BLOCK": 4096}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32")
        for name in fused._absorb_row.arg_names
    }
    source = ASTSource(fn=fused._absorb_row, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 8})
    assert compiled.asm["cubin"]


def test_the_kernel_is_the_definition() -> None:
    assert "cases agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    """Stream with the kernel in place of the torch form: other widths, dtypes, softcaps, tiles."""
    from dataclasses import replace

    import torch
    from helpers.heads import assert_no_worse, assert_same_tokens, make_case

    from vllm_diffusion.head import fused, native, sample

    native.absorb, native.fits = fused.absorb, lambda _: True
    count = 0
    for tile, vocab, softcap, dtype, temperature in (
        (64, 700, 30.0, torch.float32, None),
        (128, 700, None, torch.float32, None),
        (4096, 700, 30.0, torch.float32, None),
        (4096, 4096 + 33, 30.0, torch.float32, None),
        (64, 1, 30.0, torch.float32, None),
        (128, 512, 30.0, torch.bfloat16, None),
        (64, 700, 30.0, torch.float32, 4e-3),
        (64, 700, 30.0, torch.float32, 1e3),
    ):
        sample.TILE = tile
        case = make_case(3, vocab=vocab, softcap=softcap, dtype=dtype, hidden=16)
        if temperature is not None:
            case = replace(case, temperature=torch.full_like(case.temperature, temperature))
        truth, plain = case.truth(), case.reference()(case.rows())
        if dtype == torch.bfloat16:
            exact, logits = case.reference(), plain and case.reference().logits(case.hidden)
            embedding = case.embedding.double()
            truth = replace(
                exact,
                logits=lambda _, logits=logits: logits.double(),
                soft_embedding=lambda prob, embedding=embedding: prob @ embedding * 5.65,
            )(case.rows())
        ours = case.streaming()(case.rows())
        assert_same_tokens(ours, truth)
        assert_no_worse(ours, plain, truth)
        count += 1
    sample.TILE = 64
    for seed in range(3):
        case = make_case(seed, rewrite=True)
        assert_same_tokens(case.streaming()(case.rows()), case.truth())
        count += 1
    for softcap in (30.0, None):
        case = make_case(0, vocab=100, softcap=softcap)
        case.hidden[3] = torch.nan
        ours = case.streaming()(case.rows())
        assert ours.entropy[3].isnan()
        assert 0 <= int(ours.sample[3]) < 100
        assert 0 <= int(ours.argmax[3]) < 100
        count += 1
    print(count, "cases agree")


if __name__ == "__main__":
    in_the_interpreter()
