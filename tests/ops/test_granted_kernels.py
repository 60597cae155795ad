"""The Triton forms of `engine.granted`, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.interpreter import compiled_for, interpreted


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.engine import granted_kernels

    flags = ("causals", "fuseds", "out_fused", "out_idle")
    kinds = dict.fromkeys(flags, "*i1") | {"rejecteds": "*i32", "nobody": "i32", "stride": "i32"}
    constants = {"LENGTH": 256, "BLOCK": 256}
    for kernel in (granted_kernels._inspect_slots, granted_kernels._end):
        assert compiled_for(capability, kernel, kinds, constants, other="*i64")["cubin"]


@pytest.mark.parametrize("foreseen", [False, True])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_placing_kernel_compiles_without_a_gpu(capability: int, *, foreseen: bool) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.engine import granted_kernels

    kinds = dict.fromkeys(("causals", "fuseds", "nowhere"), "*i1")
    kinds |= dict.fromkeys(("mapping", "lens", "known", "input_ids"), "*i32")
    kinds |= dict.fromkeys(("requests", "known_stride"), "i32")
    constants = {"LENGTH": 256, "BLOCK": 256, "FORESEEN": foreseen}
    kernel = granted_kernels._place
    assert compiled_for(capability, kernel, kinds, constants, other="*i64")["cubin"]


def test_the_kernels_agree_with_the_definition() -> None:
    assert interpreted(__file__) == "30 batches agree"


def in_the_interpreter() -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    import torch

    from vllm_diffusion.engine import granted, granted_kernels
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
        form = granted_kernels if kernels else granted
        assert form.inspect_slots(pool, slots, text).ran is None  # only a look
        rows = replace(form.inspect_slots(pool, slots, text, begin=True), index=index)
        looked = [rows.fused, rows.committed, rows.idle, rows.before]
        zeros = torch.zeros_like(slots)
        batch = CanvasBatch(slots=slots, width=zeros, position=zeros, valid=zeros)
        ran = rows.begin(pool, batch)
        causal = pool.causal.clone()
        form.settle(rows, pool, emission, rejected, drafts)
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
        assert place_both(pick, state) == []
    print("30 batches agree")


def place_both(pick: Any, state: Any) -> list[str]:
    """What the kernel places otherwise than the definition, in a random batch of the pool."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from vllm_diffusion.engine import granted, granted_kernels

    length, count, cpu = 12, 5, torch.device("cpu")
    front = torch.randint(3, (count,), generator=pick) * 6
    behind = torch.randint(2, (count,), generator=pick) * length
    behind[front == 0] = length
    front[0], behind[1] = 6, length
    rows = (front + behind).numpy()
    starts = np.concatenate([[0], rows.cumsum()])
    cu_num_logits = np.concatenate([[0], behind.numpy().cumsum()])
    slots = torch.randperm(8, generator=pick)[:count]
    lens = torch.from_numpy(rows) + torch.randint(9, (count,), generator=pick)
    known = torch.randint(99, (9, 80), generator=pick).int()
    found = []
    for foreseen in (False, True):
        results = []
        for form in ("cpu", "cuda"):
            pool = SimpleNamespace(**vars(state), device=cpu)
            batch = SimpleNamespace(
                num_reqs=count,
                num_scheduled_tokens=rows,
                num_draft_tokens_per_req=behind.numpy(),
                is_prefilling_np=np.zeros(count, bool),
                query_start_loc_np=starts,
                cu_num_logits_np=cu_num_logits,
                idx_mapping=slots.int(),
                seq_lens=lens.int(),
                input_ids=torch.zeros(int(starts[-1]), dtype=torch.int32),
                logits_indices=torch.arange(int(cu_num_logits[-1])) + 100,
            )
            states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=known))
            if form == "cpu":
                nowhere = granted.place_rows(batch, pool, states, foreseen=foreseen)
            else:
                at = np.flatnonzero(front.numpy())
                told = [at, starts[at], front.numpy()[at], behind.numpy()[at], cu_num_logits[at]]
                nowhere = granted_kernels.place_rows(
                    torch.from_numpy(np.stack(told)),
                    batch,
                    pool,
                    known,
                    longest=int(rows.max()),
                    foreseen=foreseen,
                )
            # The definition leaves rows alone where no request has text in front.
            owned = np.repeat(front.numpy() > 0, rows)
            results.append((nowhere, batch.input_ids[owned], batch.logits_indices))
        names = ("nowhere", "input_ids", "logits_indices")
        both = zip(names, *results, strict=True)
        found += [f"{name} {foreseen}" for name, one, other in both if not torch.equal(one, other)]
    return found


if __name__ == "__main__":
    in_the_interpreter()
