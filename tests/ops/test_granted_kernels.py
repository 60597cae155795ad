"""The Triton forms of `GrantedRows`, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import compiled_for, interpreted


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.engine import granted_kernels

    flags = ("causals", "fuseds", "out_fused", "out_idle")
    kinds = dict.fromkeys(flags, "*i1") | {"rejecteds": "*i32", "nobody": "i32", "stride": "i32"}
    constants = {"LENGTH": 256, "BLOCK": 256}
    for kernel in (granted_kernels._look, granted_kernels._end):
        assert compiled_for(capability, kernel, kinds, constants, other="*i64")["cubin"]


def test_the_kernels_agree_with_the_definition() -> None:
    assert interpreted(__file__) == "30 batches agree"


def in_the_interpreter() -> None:
    from dataclasses import replace
    from types import SimpleNamespace
    from typing import Any

    import torch

    from vllm_diffusion.engine import granted_kernels
    from vllm_diffusion.engine.granted import GrantedRows
    from vllm_diffusion.records import CanvasBatch, Emission

    pick = torch.Generator().manual_seed(3)
    length, slots_at_all = 12, 9

    def below(top: int, *shape: int) -> torch.Tensor:
        return torch.randint(top, shape, generator=pick)

    def emission_of(count: torch.Tensor) -> Emission:
        zeros = torch.zeros_like(count)
        tokens = below(99, len(count), length)
        return Emission(tokens=tokens, count=count, steps=zeros, reason=zeros, entropy=zeros)

    def run(kernels: bool, state: Any, inputs: Any) -> list[Any]:
        pool = SimpleNamespace(**{k: v.clone() for k, v in vars(state).items()}, num_slots=9)
        slots, text, index, emission, rejected, drafts = inputs
        rejected, drafts = rejected.clone(), drafts.clone()
        if kernels:
            assert granted_kernels.among(pool, slots, text).ran is None  # only a look
        among = (granted_kernels if kernels else GrantedRows).among
        rows = replace(among(pool, slots, text, begin=True), index=index)
        looked = [rows.fused, rows.committed, rows.idle, rows.before]
        zeros = torch.zeros_like(slots)
        batch = CanvasBatch(slots=slots, width=zeros, position=zeros, valid=zeros)
        ran = rows.begin(pool, batch)
        causal = pool.causal.clone()
        if kernels:
            granted_kernels.end(rows, pool, emission, rejected, drafts)
        else:
            rows.end(pool, emission, rejected, drafts)
        return [*looked, ran.slots, ran.idle, causal, pool.causal, rejected, drafts]

    for number in range(30):
        count = 1 + int(below(5, 1))
        state = SimpleNamespace(
            causal=below(2, slots_at_all) == 1,
            fused=below(3, slots_at_all) > 0,
            count=1 + below(length, slots_at_all),
            tokens=below(99, slots_at_all, length),
        )
        slots = torch.randperm(slots_at_all - 1, generator=pick)[:count]
        text = None
        if number % 2:  # nothing, a canvas, or just what is to be committed
            text = torch.stack(
                [torch.zeros(count), torch.full((count,), length), state.count[slots]]
            )
            text = text.long().gather(0, below(3, 1, count))[0]
        index = torch.randperm(7, generator=pick)[:count] if number % 3 else None
        emission = emission_of(below(2, count) * length)
        inputs = slots, text, index, emission, below(9, 7).int(), below(9, slots_at_all, length + 2)
        if index is None:
            inputs = (*inputs[:4], inputs[4][:count], inputs[5])
        both = zip(run(False, state, inputs), run(True, state, inputs), strict=True)
        for place, (definition, kernel) in enumerate(both):
            assert (definition is None) == (kernel is None)
            assert definition is None or torch.equal(definition, kernel), (number, place)
    print("30 batches agree")


if __name__ == "__main__":
    in_the_interpreter()
