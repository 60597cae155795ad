"""The kernels that a GPU runs beside the head, in Triton's interpreter, against the definitions.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

import pytest
from helpers.interpreter import compiled_for, interpreted, spilled

if TYPE_CHECKING:
    from torch import Generator

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Commit

VOCAB = 262144


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_without_spills(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion import canvas_kernels
    from vllm_diffusion.engine import canvases_kernels
    from vllm_diffusion.rules import entropy_bound_kernels

    sizes = {"VOCAB": VOCAB, "MASK": -1, "REMEMBERED": 2, "LENGTH": 256, "BLOCK": 256}
    several = {"slots", "widths", "positions", "seeds", "steps", "limits", "stabilities"}
    several |= {"argmaxes", "samples", "last_argmaxes", "histories", "next_tokens", "reasons"}
    several |= {"row_seeds", "row_steps", "first_steps", "decided_reasons"}
    kinds = dict.fromkeys(several, "*i64")
    kinds |= {f"commit_{name}": "*i64" for name in ("tokens", "rows", "counts")}
    kinds |= {
        f"pool_{name}": "*i64" for name in ("tokens", "argmaxes", "counts", "rows", "reasons")
    }
    kinds |= {f"emitted_{name}": "*i64" for name in ("tokens", "counts", "steps", "reasons")}
    kinds |= dict.fromkeys(
        ("accepts", "finisheds", "causals", "fuseds", "go_on", "reuses", "revealeds"), "*i1"
    )
    kinds |= {"t_mins": "*fp64", "t_maxs": "*fp64", "size": "i32"}
    kinds |= {"beliefs": "*bf16", "pool_beliefs": "*bf16"}
    here = dict.fromkeys(("first", "seq_lens", "text_ends", "tokens", "gained"), "*i32")
    here |= dict.fromkeys(("rejected", "facts"), "*i32") | {"widest": "*i64"}
    here |= {"request_slots": "*i64", "widths": "*i64", "places": "*i64", "drafts": "*i64"}
    kinds |= here | {"valids": "*i1", "emitted_entropies": "*i32", "draft_stride": "i32"}
    for kernel, constants, warps in (
        (entropy_bound_kernels._key_rows, {"FACTOR": True, "LENGTH": 256, "BLOCK": 256}, 4),
        (entropy_bound_kernels._decide_canvas, sizes, 8),
        (canvas_kernels._apply_canvas, sizes, 4),
        (canvas_kernels._apply_canvas, sizes | {"commit_rows": None, "commit_counts": None}, 4),
        (canvas_kernels._store_soft_embeddings, {"BLOCK": canvas_kernels._COPIED}, 4),
        (canvas_kernels._begin_canvas, sizes, 4),
        (canvas_kernels._apply_canvas, sizes | {"MASK": 7, "REMEMBERED": 0}, 4),
        (canvas_kernels._begin_canvas, sizes | {"MASK": 7, "REMEMBERED": 0}, 4),
        (canvases_kernels._lay_out_canvas, {"LENGTH": 256, "BLOCK": 256}, 4),
        *(
            (canvases_kernels._write_output, {"LENGTH": 256, "BLOCK": 256, **text}, 4)
            for text in ({"GRID": 1, "WHOLE": False}, {"GRID": 32, "WHOLE": True})
        ),
    ):
        options = {"num_warps": warps}
        compiled = compiled_for(
            capability, kernel, kinds, constants, other="*fp32", options=options
        )
        assert spilled(compiled["ptx"]) == 0


def test_the_kernels_are_the_definitions() -> None:
    assert "steps agree" in interpreted(__file__)


def test_requests_get_their_canvases_and_what_these_give() -> None:
    assert "batches agree" in interpreted(__file__, "requests")


def test_canvases_on_kernels_equal_the_published_loop() -> None:
    assert "tests of the step pass" in interpreted(__file__, "published")


def in_the_interpreter() -> None:
    """Random pools, some steps long: every state a slot may be in, beside every other."""
    import torch

    from vllm_diffusion.canvas_kernels import CanvasPoolKernels
    from vllm_diffusion.rules.entropy_bound import EntropyBound
    from vllm_diffusion.rules.entropy_bound_kernels import EntropyBoundKernels

    compared = 0
    for seed, (length, remembered) in enumerate(((8, 0), (8, 1), (5, 3), (33, 2), (64, 1))):
        rng = torch.Generator().manual_seed(seed)
        pool = random_pool(rng, length, remembered)
        twin = random_pool(torch.Generator().manual_seed(seed), length, remembered)
        twin.__class__ = CanvasPoolKernels
        rule, kernels = EntropyBound(pool.noise), EntropyBoundKernels(twin.noise)
        assert_same_pool(pool, twin)
        for turn in range(8):
            batch = random_batch(rng, pool)
            stats = random_stats(rng, pool, batch)
            factor = torch.rand(len(batch.slots), generator=rng) if turn % 2 else None
            temperature, noise = rule.keyed(pool, batch, factor)
            same_temperature, same_noise = kernels.keyed(twin, batch, factor)
            assert torch.equal(temperature, same_temperature)
            assert_same(noise, same_noise)
            decision = rule.decide(pool, batch, stats)
            assert_same(decision, kernels.decide(twin, batch, stats))
            if turn % 4 == 3:
                decision = replace(decision, commit=random_commit(rng, batch))
            assert_same(
                pool.apply(batch, stats, decision),
                twin.apply(batch, stats, decision),
            )
            assert_same_pool(pool, twin)
            if turn % 3 == 0:
                begun = batch.slots[: len(batch.slots) // 2]
                position = batch.position[: len(begun)] + 7
                pool.begin(begun, position)
                twin.begin(begun, position)
                assert_same_pool(pool, twin)
            compared += 1
    print(compared, "steps agree")


def requests() -> None:
    """Batches of prompts and canvases, some of them narrow, more than are counted at once."""
    from itertools import product

    import torch

    from vllm_diffusion.engine import canvases, canvases_kernels
    from vllm_diffusion.engine.step_rows import StepRows
    from vllm_diffusion.family import Family, Text
    from vllm_diffusion.records import Emission

    rng = torch.Generator().manual_seed(0)
    compared, length = 0, 5
    for num, text in product((1, 2, 7, 300), Text):
        family = Family(
            name="x", rule="entropy_bound", text=text, block=length, horizon=text is Text.WHOLE
        )
        pool = random_pool(rng, length, 1, slots=num + 1)
        width = torch.randint(0, length + (4 if family.horizon else 1), (num,), generator=rng)
        width[0] = length
        count = int((width > 0).sum())
        rows = StepRows(
            slots=torch.randperm(num + 1, generator=rng)[:num],
            seq_lens=torch.randint(9, 500, (num + 3,), generator=rng, dtype=torch.int32),
            first=torch.cat([torch.zeros(1), width.cumsum(0)]).int(),
            text_end=torch.randint(9, 500, (num + 1,), generator=rng, dtype=torch.int32),
            widest=torch.randint(1, length + 1, (num + 1,), generator=rng)
            if family.horizon
            else torch.full((num + 1,), length),
            reuses=torch.rand(num + 1, generator=rng) < 0.5,
        )
        batch, places = canvases.canvases_of(rows, count=count, length=length)
        same_batch, same_places = canvases_kernels.canvases_of(rows, count=count, length=length)
        assert_same(batch, same_batch)
        assert torch.equal(places, same_places)
        emitted = torch.randint(0, 2, (count,), generator=rng)
        emission = Emission(
            tokens=torch.randint(VOCAB, (count, length), generator=rng),
            count=batch.width * emitted,
            steps=3 * emitted,
            reason=1 + emitted,
            entropy=torch.rand(count, generator=rng),
        )
        drafts = torch.zeros(num + 1, length + 2, dtype=torch.int64)
        same_drafts = drafts.clone()
        told = canvases.step_output(family, pool, rows, emission, drafts)
        same_told = canvases_kernels.step_output(family, pool, rows, emission, same_drafts)
        assert torch.equal(drafts, same_drafts)
        assert_same(replace(told, committed=None), replace(same_told, committed=None))
        assert told.committed
        assert same_told.committed
        assert_same(told.committed, same_told.committed)
        compared += 1
    print(compared, "batches agree")


def the_published_loop() -> None:
    """The tests that hold ``advance`` to the published loop, with the kernels in it."""
    from helpers import table_model
    from unit import test_step

    from vllm_diffusion.canvas_kernels import CanvasPoolKernels
    from vllm_diffusion.rules.entropy_bound_kernels import EntropyBoundKernels

    table_model.CanvasPool, table_model.EntropyBound = CanvasPoolKernels, EntropyBoundKernels
    for test, case in (
        ("three_canvases_equal_the_published_loop", {"stability": 2, "sharpness": 3.0, "seeds": 2}),
        ("other_entropy_bounds_equal_the_published_loop", {"bound": 0.5}),
        ("what_held_is_the_next_input_beside_what_the_bound_accepts", {"hold": 0.5}),
        ("a_narrow_canvas_equals_the_published_loop_at_that_length", {"width": 7}),
    ):
        getattr(test_step, f"test_{test}").__wrapped__(**case)
    print("tests of the step pass")


def random_pool(rng: Generator, length: int, remembered: int, slots: int = 6) -> CanvasPool:
    import torch

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import EntropyBoundConstants

    published = EntropyBoundConstants(
        max_steps=3,
        t_min=0.3,
        t_max=0.7,
        entropy_bound=0.1,
        confidence_threshold=0.3,
        stability_threshold=remembered,
    )
    pool = CanvasPool(
        num_slots=slots,
        canvas_length=length,
        hidden_size=3,
        vocab_size=VOCAB,
        constants=published,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for slot in range(slots):
        rule = replace(
            published,
            max_steps=1 + slot,
            entropy_bound=(0.0, 0.1, 1.0, 50.0, 0.4, 2.0)[slot % 6],
            stability_threshold=slot % (remembered + 1),
            hold_threshold=(0.0, 0.4, 0.01)[slot % 3],
            doubt_threshold=0.7 * (slot % 3),
        )
        seed = int(torch.randint(2**62, (), generator=rng)) * 4 + slot
        pool.admit(slot, seed=seed, constants=rule, fused=slot % 3 == 0)
    # One was admitted and has not begun, one begins from a draft.
    begun = torch.tensor([slot for slot in range(slots) if slot != 3])
    pool.begin(begun, (begun * 77_777_777)[:, None] + torch.arange(length))
    pool.first_step[-1] = pool.step[-1] = 2
    return pool


def random_batch(rng: Generator, pool: CanvasPool) -> CanvasBatch:
    import torch

    from vllm_diffusion.records import CanvasBatch

    length = pool.canvas_length
    count = int(torch.randint(1, pool.num_slots + 1, (), generator=rng))
    slots = torch.randperm(pool.num_slots, generator=rng)[:count]
    width = torch.randint(1, length + 1, (count,), generator=rng)
    width[torch.rand(count, generator=rng) < 0.5] = length
    start = torch.randint(0, 10_000, (count,), generator=rng)
    return CanvasBatch(
        slots=slots,
        width=width,
        position=start[:, None] + torch.arange(length),
        valid=torch.arange(length) < width[:, None],
        idle=torch.rand(count, generator=rng) < 0.3 if count % 2 else None,
    )


def random_stats(rng: Generator, pool: CanvasPool, batch: CanvasBatch) -> CanvasStats:
    """Ties everywhere, argmaxes that often hold, rows of NaN; sums that rounding cannot move."""
    import torch

    from vllm_diffusion.records import CanvasStats

    shape = batch.position.shape
    # Multiples of 1/64: any order of adding gives the same sum.
    entropy = torch.randint(0, 4, shape, generator=rng) / 64
    entropy += 3 * (torch.rand(shape, generator=rng) < 0.2)
    entropy[torch.rand(shape[0], generator=rng) < 0.4] /= 16
    top_prob = 1 - torch.randint(0, 32, shape, generator=rng) / 1024
    argmax = torch.randint(VOCAB, shape, generator=rng)
    holds = torch.rand(shape[0], 1, generator=rng) < 0.6
    argmax = torch.where(holds, pool.argmax[batch.slots], argmax)
    near = torch.rand(shape, generator=rng) < 0.5
    top_prob = torch.where(near, pool.top_prob[batch.slots], top_prob)
    top_prob[torch.rand(shape, generator=rng) < 0.2] = 0.03
    entropy[torch.rand(shape, generator=rng) < 0.01] = torch.inf
    broken = torch.rand(shape, generator=rng) < 0.02
    soft = torch.randn(*shape, 3, generator=rng)
    soft[broken] = torch.nan
    soft[..., 1][torch.rand(shape, generator=rng) < 0.02] = torch.inf
    return CanvasStats(
        argmax=argmax,
        sample=torch.randint(VOCAB, shape, generator=rng),
        entropy=entropy.masked_fill(broken, torch.nan),
        top_prob=top_prob.masked_fill(broken, torch.nan),
        margin=torch.zeros(shape),
        soft_embedding=soft,
    )


def random_commit(rng: Generator, batch: CanvasBatch) -> Commit:
    import torch

    from vllm_diffusion.records import Commit

    num, length = batch.position.shape
    return Commit(
        tokens=torch.randint(VOCAB, (num, length), generator=rng),
        rows=torch.argsort(torch.rand(num, length, generator=rng), dim=1),
        count=(torch.rand(num, generator=rng) * batch.width).long() + 1,
    )


def assert_same(one: object, other: object) -> None:
    """Two records of tensors or of nothing, NaN equal to NaN."""
    import torch

    for field in fields(one):  # type: ignore[arg-type]
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert (mine is None) == (theirs is None), field.name
        if is_dataclass(mine):
            assert_same(mine, theirs)
        elif mine is not None:
            assert mine.dtype == theirs.dtype, field.name
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=field.name)


def assert_same_pool(one: CanvasPool, other: CanvasPool) -> None:
    import torch

    tensors = {name: value for name, value in vars(one).items() if torch.is_tensor(value)}
    assert len(tensors) > 13
    for name, mine in tensors.items():
        theirs = getattr(other, name)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


if __name__ == "__main__":
    import sys

    {"published": the_published_loop, "requests": requests}.get(sys.argv[-1], in_the_interpreter)()
