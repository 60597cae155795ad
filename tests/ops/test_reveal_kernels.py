"""The kernels of ``reveal`` and of a pool on absorbing noise, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from helpers.interpreter import compiled_for, interpreted, spilled

if TYPE_CHECKING:
    from torch import Generator

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats

VOCAB, MASK = 151936, 11


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize(("length", "grid"), [(4, 4), (32, 0), (256, 256)])
def test_the_kernels_compile_without_spills(capability: int, length: int, grid: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.rules import reveal_kernels

    several = {"slots", "widths", "positions", "samples", "pool_tokens", "seeds", "steps", "limits"}
    several |= {"bys", "next_tokens", "reasons", "row_seeds", "row_steps", "ends", "counts"}
    kinds = dict.fromkeys(several, "*i64") | {"accepts": "*i1", "finisheds": "*i1"}
    sizes = {"ENDS": 4, "MASK": MASK, "OTHER": 0, "GRID": grid, "LENGTH": length, "BLOCK": length}
    options = {"num_warps": reveal_kernels._WARPS}
    for kernel, constants in (
        (reveal_kernels._key_rows, sizes | {"FACTOR": True}),
        (reveal_kernels._decide_canvas, sizes),
        (reveal_kernels._decide_canvas, sizes | {"sample_probs": None, "own_probs": None}),
    ):
        compiled = compiled_for(
            capability, kernel, kinds, constants, other="*fp32", options=options
        )
        assert spilled(compiled["ptx"]) == 0


def test_the_kernels_are_the_definitions() -> None:
    assert "96 steps agree" in interpreted(__file__)


def test_canvases_on_kernels_equal_the_loop() -> None:
    assert "loops agree" in interpreted(__file__, "loops")


def in_the_interpreter() -> None:
    """Random pools, some steps long: every state a slot may be in, beside every other."""
    import torch
    from ops.test_step_kernels import assert_same, assert_same_pool, random_commit

    from vllm_diffusion.canvas_kernels import CanvasPoolKernels
    from vllm_diffusion.denoise.constants import REVEAL_BY
    from vllm_diffusion.rules.reveal import Reveal
    from vllm_diffusion.rules.reveal_kernels import RevealKernels

    compared = 0
    for seed, (length, block) in enumerate(
        ((8, 8), (8, None), (4, 4), (5, None), (33, 40), (64, None)) * 2
    ):
        rng = torch.Generator().manual_seed(seed)
        # Half of the pools ask for one score alone, without the probabilities that it leaves out.
        by = REVEAL_BY if seed % 2 else (REVEAL_BY[seed // 2 % len(REVEAL_BY)],)
        pool = random_pool(rng, length, by)
        twin = random_pool(torch.Generator().manual_seed(seed), length, by)
        twin.__class__ = CanvasPoolKernels
        rule = Reveal(pool.noise, block=block)
        kernels = RevealKernels(twin.noise, block=block)
        assert_same_pool(pool, twin)
        for turn in range(8):
            batch = random_batch(rng, pool)
            stats = random_stats(rng, batch, *rule.probabilities(pool))
            factor = torch.rand(len(batch.slots), generator=rng) if turn % 2 else None
            temperature, noise = rule.keyed(pool, batch, factor)
            same_temperature, same_noise = kernels.keyed(twin, batch, factor)
            assert torch.equal(temperature, same_temperature)
            assert_same(noise, same_noise)
            decision = rule.decide(pool, batch, stats)
            assert_same(decision, kernels.decide(twin, batch, stats))
            if turn % 4 == 3:
                decision = replace(decision, commit=random_commit(rng, batch))
            emission = pool.apply(batch, stats, decision)
            assert emission.revealed is not None
            assert_same(emission, twin.apply(batch, stats, decision))
            assert_same_pool(pool, twin)
            assert twin.argmax is twin.tokens
            if turn % 3 == 0:
                begun = batch.slots[: len(batch.slots) // 2]
                position = batch.position[: len(begun)] + 7
                pool.begin(begun, position)
                twin.begin(begun, position)
                assert_same_pool(pool, twin)
            compared += 1
    print(compared, "steps agree")


def loops() -> None:
    """The tests that hold ``advance`` to a loop in plain Python, with the kernels in it."""
    from helpers import reveal_model
    from unit.rules import test_reveal

    from vllm_diffusion import rules
    from vllm_diffusion.canvas_kernels import CanvasPoolKernels

    reveal_model.CanvasPool = CanvasPoolKernels
    rules._RULES.update(rules._KERNELS)
    for seed in range(5):
        for name in reveal_model.FAMILIES:
            test_reveal.test_canvases_of_a_mixed_batch_equal_the_loop.__wrapped__(seed, name)
    test_reveal.test_given_text_is_closed_from_the_first_step_on()
    test_reveal.test_the_next_canvas_begins_open()
    print("loops agree")


def random_pool(rng: Generator, length: int, by: tuple[str, ...], slots: int = 6) -> CanvasPool:
    import torch

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import PROBABILITIES, RevealConstants
    from vllm_diffusion.denoise.noise import AbsorbingNoise

    default = RevealConstants(max_steps=3, reveal_threshold=0.0, reveal_by=by[0])
    pool = CanvasPool(
        num_slots=slots,
        canvas_length=length,
        hidden_size=None,
        vocab_size=VOCAB,
        constants=default,
        noise=AbsorbingNoise(MASK),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for slot in range(slots):
        name = by[slot % len(by)]
        rule = replace(
            default,
            max_steps=(1, 2, 3, 4, 9, 40)[slot % 6],
            reveal_by=name,
            reveal_threshold=(0.0, 0.25, 0.5)[slot % 3] if name in PROBABILITIES else 0.0,
        )
        seed = int(torch.randint(2**62, (), generator=rng)) * 4 + slot
        # Few ids, so that some canvas has one of them: see ``random_stats``.
        ends = (3, 1, VOCAB - 1)[: slot % 4]
        pool.admit(slot, seed=seed, constants=rule, fused=slot % 3 == 0, ends=ends)
    # One was admitted and has not begun, one begins from a draft.
    begun = torch.tensor([slot for slot in range(slots) if slot != 3])
    pool.begin(begun, (begun * 77_777_777)[:, None] + torch.arange(length))
    given = torch.randint(VOCAB, (slots, length), generator=rng)
    given[torch.rand(slots, length, generator=rng) < 0.7] = -1
    pool.begin_from(torch.arange(slots), torch.arange(slots) > 3, given, torch.arange(slots) // 5)
    return pool


def random_batch(rng: Generator, pool: CanvasPool) -> CanvasBatch:
    from ops import test_step_kernels

    return test_step_kernels.random_batch(rng, pool)


def random_stats(
    rng: Generator, batch: CanvasBatch, sample_prob: bool, own_prob: bool
) -> CanvasStats:
    """Ties everywhere, rows of NaN and infinity, tokens that come out as the mask."""
    import torch

    from vllm_diffusion.records import CanvasStats

    shape = batch.position.shape

    def some() -> torch.Tensor:
        values = torch.randint(0, 5, shape, generator=rng) / 4
        values[torch.rand(shape, generator=rng) < 0.05] = torch.nan
        values[torch.rand(shape, generator=rng) < 0.02] = torch.inf
        return values

    sample = torch.randint(VOCAB, shape, generator=rng)
    sample[torch.rand(shape, generator=rng) < 0.05] = MASK
    sample[torch.rand(shape, generator=rng) < 0.2] = 3
    return CanvasStats(
        argmax=torch.randint(VOCAB, shape, generator=rng),
        sample=sample,
        entropy=some() / 16,  # a mean that no order of adding changes
        top_prob=torch.rand(shape, generator=rng),
        margin=some(),
        soft_embedding=None,
        sample_prob=some() if sample_prob else None,
        own_prob=some() if own_prob else None,
    )


if __name__ == "__main__":
    import sys

    {"loops": loops}.get(sys.argv[-1], in_the_interpreter)()
