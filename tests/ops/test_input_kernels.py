"""The Triton form of `inputs.condition`, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import compiled_for, interpreted


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_kernels_compile_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.engine import input_kernels

    kinds = {"phase": "*i1", "canvas_rows": "*i1", "place": "*i32"}
    kinds |= dict.fromkeys(("slots", "rows"), "*i64")
    kinds |= dict.fromkeys(("slot_stride", "place_stride"), "i32")
    constants = {"width": 2816, "eps": 1e-6, "BLOCK": 4096}
    for kernel in (input_kernels._load_soft_embeddings, input_kernels._add_embeddings):
        options = {"num_warps": 8}
        assert compiled_for(capability, kernel, kinds, constants, other="*bf16", options=options)[
            "cubin"
        ]


def test_the_kernels_are_no_worse_than_the_definition() -> None:
    assert "cases agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    from types import SimpleNamespace

    import torch
    from torch import nn

    from vllm_diffusion.engine import input_kernels, inputs

    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) if weight is None else y.to(weight.dtype) * weight

    class Layer(nn.Module):
        """`SelfConditioning` with a linear map between the norms, to see what goes in and out."""

        def __init__(self, width: int, dtype: torch.dtype) -> None:
            super().__init__()
            weight = torch.randn(width, generator=pick).to(dtype)
            self.pre_norm = SimpleNamespace(weight=weight, variance_epsilon=1e-6)
            self.post_norm = SimpleNamespace(variance_epsilon=1e-6)

        def inner(self, normed: torch.Tensor) -> torch.Tensor:
            return normed.flip(1) * 3

        def forward(self, plain: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
            inner = self.inner(norm(soft, self.pre_norm.weight.to(soft.dtype)))
            return norm(plain + inner, None)

    pick = torch.Generator().manual_seed(5)
    slots_at_all, length = 5, 12
    placed: list[torch.Tensor] = []
    adapters = SimpleNamespace(place=lambda marks, of: placed.append(marks[of].clone()))
    for width, dtype in ((16, torch.float32), (33, torch.float32), (48, torch.bfloat16)):
        soft = torch.randn(slots_at_all, length, width, generator=pick).to(dtype)
        soft[2] = 0
        phase = torch.tensor([False, True, False, False, True])
        slots = torch.tensor([3, 1, 2]).repeat_interleave(length)
        place = torch.arange(length, dtype=torch.int32).repeat(3)
        rows = torch.randperm(50, generator=pick)[: slots.shape[0]]
        before = torch.randn(50, width, generator=pick).to(dtype)
        layer, results = Layer(width, dtype), []
        placed.clear()
        for form, kind in (
            (inputs.condition, dtype),
            (inputs.condition, torch.float64),
            (input_kernels.condition, dtype),
        ):
            embeds, marks = before.clone().to(kind), torch.zeros(60, 1, dtype=torch.bool)
            form(
                embeds,
                marks,
                rows=rows,
                slots=slots,
                place=place,
                phase=phase,
                soft=soft.to(kind),
                layer=layer,
                adapters=adapters,
            )
            results.append((embeds, marks))
        (plain, marks), (truth, _), (ours, our_marks) = results
        assert torch.equal(marks, our_marks)
        assert torch.equal(placed[0], placed[2])
        assert int(marks.sum()) == 2 * length
        error, bar = ((x.double() - truth).abs().max() for x in (ours, plain))
        assert error <= 1.5 * bar, (dtype, error, bar)
        assert (ours != before).any(1).sum() == 2 * length
    print("3 cases agree")


if __name__ == "__main__":
    in_the_interpreter()
