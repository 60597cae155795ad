"""The head's chunks of many tiles, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import interpreted, spilled

INTEGERS = ("width", "first", "rows", "hidden", "lane_stride", "listed_stride")
LONG = ("seeds", "positions", "steps", "tokens")


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_without_a_gpu_and_without_spills(capability: int, dtype: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_diffusion.head import chunk_kernels

    def without_spills(kernel, kinds: dict[str, str], constants: dict, warps: int) -> None:
        kinds |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(LONG, "*i64")
        signature = {
            name: "constexpr" if name in constants else kinds.get(name, "*fp32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        assert spilled(compiled.asm["ptx"]) == 0

    known = {"CAPPED": True, "FIRST": False, "TILE": 4096, "BLOCK": 4096}
    known["BITS"] = 16 if dtype == "bf16" else 32
    for whole, weights, lanes in ((True, True, 0), (False, True, 65), (True, False, 65)):
        without_spills(
            chunk_kernels.absorb_chunk,
            {"logits": f"*{dtype}", "listed": f"*{dtype}", "softcap": "fp32", "lanes": "*i32"},
            known | {"WHOLE": whole, "WEIGHTS": weights, "LANES": lanes},
            warps=8,
        )
    without_spills(
        chunk_kernels.finish_row,
        {"embeddings": f"*{dtype}", "scale": f"*{dtype}"},
        {"SCALE_IN_MEMORY": True, "BLOCK": 1024},
        warps=4,
    )


def test_the_chunks_are_the_definition() -> None:
    assert "cases agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    """Chunks of one tile and of several; other widths, dtypes, softcaps, temperatures, ranks."""
    from dataclasses import replace
    from threading import Lock

    import torch
    from helpers.heads import assert_no_worse, assert_same_tokens, make_case, over_ranks

    from vllm_diffusion.head import chunks, reading, sample

    used = []

    def in_chunks(vocabulary, _):
        used.append(vocabulary)
        return chunks

    reading.in_chunks = in_chunks
    absorb, lock = chunks._absorb, Lock()  # ranks are threads, and the interpreter is one

    def in_turn(*arguments, **how):
        with lock:
            absorb(*arguments, **how)

    chunks._absorb = in_turn
    cases, rows = 0, {"canvases": 4, "length": 5}
    for tile, tiles, vocab, softcap, dtype, temperature in (
        (64, 3, 700, 30.0, torch.float32, None),
        (64, 1, 700, None, torch.float32, None),
        (64, 100, 704, 30.0, torch.float32, None),
        (4096, 2, 700, 30.0, torch.float32, None),
        (4096, 1, 4096 + 33, 30.0, torch.float32, None),
        (64, 1, 1, 30.0, torch.float32, None),
        (64, 4, 512, 30.0, torch.bfloat16, None),
        (64, 2, 700, 30.0, torch.float32, 4e-3),
        (64, 2, 700, None, torch.float32, 1e3),
    ):
        sample.TILE = tile
        case = make_case(3, vocab=vocab, softcap=softcap, dtype=dtype, hidden=16, **rows)
        if temperature is not None:
            case = replace(case, temperature=torch.full_like(case.temperature, temperature))
        truth, plain = case.truth(), case.reference()(case.rows())
        if dtype == torch.bfloat16:
            exact, logits = case.reference(), case.reference().logits(case.hidden)
            embedding = case.embedding.double()
            truth = replace(
                exact,
                logits=lambda _, logits=logits: logits.double(),
                soft_embedding=lambda prob, embedding=embedding: prob @ embedding * 5.65,
            )(case.rows())
        ours = case.streaming(budget=tiles * tile * len(case.hidden) * dtype.itemsize)
        stats = ours(case.rows())
        assert_same_tokens(stats, truth)
        assert_no_worse(stats, plain, truth)
        cases += 1
    sample.TILE = 64
    case = make_case(1, vocab=512, **rows)
    for stats in over_ranks(case, 4, lambda head: head(case.rows())):
        assert_same_tokens(stats, case.truth())
        assert_no_worse(stats, case.reference()(case.rows()), case.truth())
    cases += 1
    for softcap in (30.0, None):
        case = make_case(0, vocab=200, softcap=softcap, **rows)
        case.hidden[3] = torch.nan
        ours = case.streaming(budget=64 * len(case.hidden) * 4)(case.rows())
        assert ours.entropy[3].isnan()
        assert 0 <= int(ours.sample[3]) < 200
        assert 0 <= int(ours.argmax[3]) < 200
        others = [row for row in range(len(case.hidden)) if row != 3]
        assert ours.soft_embedding[others].isfinite().all()
        cases += 1
    assert len(used) >= cases
    in_the_interpreter_near()
    print(cases, "cases agree")


def in_the_interpreter_near() -> None:
    """The mean of the best ids, in one batch with rows that take all or none, and alone."""
    import torch
    from helpers.heads import assert_same_tokens, make_case

    from vllm_diffusion.head import chunks, reading, sample

    reading.in_chunks = lambda *_: chunks
    for tile, tiles, vocab, dtype in (
        (64, 3, 700, torch.float32),
        (256, 1, 700, torch.bfloat16),
        (4096, 1, 40, torch.float32),
    ):
        sample.TILE = tile
        case = make_case(2, vocab=vocab, dtype=dtype, hidden=16, canvases=1, length=5)
        case.embedding[5:9] = case.embedding[4]  # equal logits, at a border too
        count = torch.tensor([8, 64, 16, 0, -1])
        ours = case.streaming(budget=tiles * tile * len(case.hidden) * dtype.itemsize)
        plain = case.reference()(case.rows(soft_top_k=count))
        stats = ours(case.rows(soft_top_k=count))
        close = (
            {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.3}
        )
        torch.testing.assert_close(stats.soft_embedding, plain.soft_embedding, **close)
        assert_same_tokens(stats, ours(case.rows()))
        near = torch.where(count > 0, count, 8)
        stats = ours(case.rows(soft_top_k=near))
        alone = ours(case.rows(soft_top_k=near, all_near=True))
        assert torch.equal(stats.soft_embedding, alone.soft_embedding)
        without = ours(case.rows(soft_top_k=near, self_conditioning=False))
        assert without.soft_embedding is None
        assert torch.equal(stats.entropy, alone.entropy)
        assert torch.equal(stats.entropy, without.entropy)
        assert_same_tokens(without, stats)


if __name__ == "__main__":
    in_the_interpreter()
