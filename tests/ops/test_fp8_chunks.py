"""The head's chunks from a copy in fp8, run by Triton's interpreter, against what they mean.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

from dataclasses import replace
from threading import Lock

import pytest
import torch
from helpers.heads import Case, assert_no_worse, assert_same_tokens, make_case, over_ranks
from helpers.interpreter import compiled_for, interpreted, spilled

from vllm_diffusion.head.output_copy import RESCORED, QuantisedOutput
from vllm_diffusion.quant.packed import dequantise
from vllm_diffusion.quant.rounding import to_fp8


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_without_a_gpu_and_without_spills(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.head import fp8_kernels

    kinds = dict.fromkeys(("width", "hidden_stride", "output_stride", "stride", "inputs"), "i32")
    kinds |= {"scales": "*fp32", "codes": "*fp8e4nv", "places": "*i32"}
    constants = {"COUNT": RESCORED, "BITS": 16, "TILE": 4096, "BLOCK": 4096, "PIECE": 256}
    for kernel, more in (
        (fp8_kernels.round_row, {}),
        (fp8_kernels.rescore_row, {"TILES": 8, "WHOLE": True}),
        (fp8_kernels.rescore_row, {"TILES": 64, "WHOLE": False}),
    ):
        compiled = compiled_for(
            capability,
            kernel,
            dict(kinds),
            constants | more,
            other="*bf16",
            options={"num_warps": 8},
        )
        assert spilled(compiled["ptx"]) == 0


def test_the_chunks_are_what_they_mean() -> None:
    assert "cases agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    """Chunks of one tile and of several, other widths and softcaps, strided rows, ranks."""
    from vllm_diffusion.head import chunks, reading, sample

    reading.in_chunks = lambda *_: chunks
    cases = 0
    for tile, tiles, vocab, softcap in (
        (64, 3, 400, 30.0),
        (64, 1, 100, None),
        (64, 100, 700, 30.0),
        (4096, 1, 4096 + 48, 30.0),
        (4096, 2, 5, None),
    ):
        sample.TILE = tile
        case = case_of(vocab, softcap)
        logits = logits_are_what_they_mean(case, tile * tiles)
        case_reads(case, logits, tile * tiles)
        cases += 1
    sample.TILE = 64
    rows_of_nan_and_zero()
    a_copy_follows_its_matrix()
    ranks_say_what_one_says()
    print(cases + 3, "cases agree")


def case_of(vocab: int, softcap: float | None = 30.0) -> Case:
    """In bf16, its rows those of a wider tensor."""
    case = make_case(
        3, vocab=vocab, softcap=softcap, dtype=torch.bfloat16, hidden=48, canvases=2, length=3
    )
    wide = torch.cat([case.hidden, case.hidden], dim=1)
    return replace(case, hidden=wide[:, : case.hidden.shape[1]])


def product_of(case: Case, ids: int):
    from vllm_diffusion.head.fp8_product import Fp8Product

    copy = QuantisedOutput(case.embedding, "fp8")
    return Fp8Product(case.vocabulary(), copy, case.hidden, ids)


def whole(product, vocab: int, ids: int) -> torch.Tensor:
    """[R, V], chunk by chunk."""
    return torch.cat([product(slice(at, at + ids)) for at in range(0, vocab, ids)], dim=1)


def logits_are_what_they_mean(case: Case, ids: int) -> torch.Tensor:
    """Of a chunk's best ids those of the matrix, of others those of the codes; [R, V] bf16."""
    product, vocab = product_of(case, ids), len(case.embedding)
    codes = to_fp8(case.hidden)
    assert torch.equal(product._codes.view(torch.uint8), codes.codes)
    assert torch.equal(product._scale[:, 0], codes.row_scale)
    rough, found = whole(of_codes(product), vocab, ids), whole(product, vocab, ids)
    matrix = dequantise(to_fp8(case.embedding), torch.float32)
    near = {"rtol": 2**-7, "atol": 1e-3}  # both are rounded to bf16
    torch.testing.assert_close(rough.float(), dequantise(codes, torch.float32) @ matrix.T, **near)
    exact = case.hidden.float() @ case.embedding.float().T
    for start in range(0, vocab, ids):
        some = slice(start, start + ids)
        chunk, seen, right = rough[:, some], found[:, some], exact[:, some]
        count = min(RESCORED, chunk.shape[1])
        edge = chunk.topk(count, dim=1).values[:, -1:]
        torch.testing.assert_close(seen[chunk > edge].float(), right[chunk > edge], **near)
        assert torch.equal(seen[chunk < edge], chunk[chunk < edge])
        # Of those on the edge as many are exact as there is room for.
        same = (seen == chunk) | (chunk < edge)
        assert ((~same).sum(dim=1) <= count).all()
        tight = chunk >= edge
        alone = tight.sum(dim=1) == count
        torch.testing.assert_close(
            seen[tight & alone[:, None]].float(), right[tight & alone[:, None]], **near
        )
        if chunk.shape[1] > count:
            assert (~same).any()
    return found


def of_codes(product):
    """The product alone, without exact ids."""
    from torch.nn.functional import ScalingType, scaled_mm

    def logits(some: slice) -> torch.Tensor:
        return scaled_mm(
            product._codes,
            product._weights[some].T,
            product._scale,
            ScalingType.RowWise,
            product._scales[some][None],
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
        )

    return logits


def case_reads(case: Case, logits: torch.Tensor, ids: int) -> None:
    """Statistics are those of these logits, by the definition."""

    def definition(dtype: torch.dtype, kept: torch.dtype):
        embedding = case.embedding.to(kept)

        def capped(_: torch.Tensor) -> torch.Tensor:
            given = logits.to(dtype)
            if case.softcap is None:
                return given.clone()
            return torch.tanh(given / case.softcap) * case.softcap

        return replace(
            case.reference(),
            logits=capped,
            soft_embedding=lambda prob: prob.to(kept) @ embedding * 5.65,
        )(case.rows())

    truth = definition(torch.float64, torch.float64)
    head = from_codes(case, ids)
    stats = head(case.rows())
    assert_same_tokens(stats, truth)
    # So few numbers: the head without a copy is off by as much here.
    assert_no_worse(stats, definition(torch.float32, torch.bfloat16), truth, factor=3.0)
    # As many rows at once as the budget holds: which ids are exact stays.
    narrow = replace(head, budget=2 * min(ids, len(case.embedding)) * 2)
    fewer = narrow(case.rows())
    assert_same_tokens(fewer, stats)
    torch.testing.assert_close(fewer.entropy, stats.entropy, rtol=1e-5, atol=1e-5)


def from_codes(case: Case, ids: int):
    """The head that reads chunks of so many ids from a copy."""
    from vllm_diffusion.head import chunks, sample

    chunks._TILES_OF_COPY = ids // sample.TILE
    copy = QuantisedOutput(case.embedding, "fp8")
    head = case.streaming()
    return replace(head, vocabulary=replace(case.vocabulary(), copy=copy))


def rows_of_nan_and_zero() -> None:
    """A row of NaN spoils no other, and a row of zeros has logits of zero."""
    case = case_of(200)
    case.hidden[3], case.hidden[4] = torch.nan, 0
    logits = whole(product_of(case, 128), 200, 128)
    assert logits[3].isnan().all()
    assert (logits[4] == 0).all()
    assert logits[torch.arange(len(logits)) != 3].isfinite().all()
    stats = from_codes(case, 128)(case.rows())
    assert stats.entropy[3].isnan()
    assert 0 <= int(stats.argmax[3]) < 200
    assert stats.entropy[4] == pytest.approx(torch.log(torch.tensor(200.0)).item(), abs=1e-4)


def a_copy_follows_its_matrix() -> None:
    """Weights that are loaded again are rounded again."""
    case = case_of(256)
    head = from_codes(case, 256)
    before = head(case.rows())
    case.embedding.copy_(case.embedding.flip(0))
    after = head(case.rows())
    assert torch.equal(after.argmax, 255 - before.argmax)


def ranks_say_what_one_says() -> None:
    """Ranks whose parts are the chunks of one rank."""
    from vllm_diffusion.head import chunks
    from vllm_diffusion.head.fp8_product import Fp8Product as product  # noqa: N813

    lock = Lock()  # ranks are threads, and the interpreter is one

    def in_turn(function):
        def locked(*arguments, **how):
            with lock:
                return function(*arguments, **how)

        return locked

    chunks._absorb = in_turn(chunks._absorb)
    product.__init__, product.__call__ = in_turn(product.__init__), in_turn(product.__call__)
    case = case_of(256)
    alone = from_codes(case, 128)(case.rows())

    def call(head):
        copy = QuantisedOutput(head.vocabulary.output, "fp8")
        return replace(head, vocabulary=replace(head.vocabulary, copy=copy))(case.rows())

    for stats in over_ranks(case, 2, call):
        assert_same_tokens(stats, alone)
        torch.testing.assert_close(stats.entropy, alone.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.soft_embedding, alone.soft_embedding, rtol=0.02, atol=0.1)


if __name__ == "__main__":
    in_the_interpreter()
