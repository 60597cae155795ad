"""The Triton form of `attention_ranges`, run by Triton's interpreter, against the definition.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
`tests/contract/test_attention_gpu.py` drives vLLM's attention through both forms.
"""

from __future__ import annotations

import pytest
from helpers.interpreter import compiled_for, interpreted

CAPABILITIES = [90, 100, 120]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from vllm_diffusion.engine.attention import kernels

    kinds = {"phase": "*i1", "slots": "*i64"}
    numbers = ("count", "padded", "tokens", "window", "block", "blocks", "width")
    kinds |= dict.fromkeys((*numbers, "table_stride", "out_stride"), "i32")
    kinds |= dict.fromkeys(("tables", "out"), ("*i32",) * 5)
    whole = dict.fromkeys(("text", "request", "behind", "lens", "part_lens"))
    for kernel, constants in (
        (kernels._mark, {"BLOCK": 128}),
        (kernels._mark, {"BLOCK": 128, **whole}),
        (kernels._sequence_ranges, {"BLOCK": 128}),
        (kernels._row_ranges, {"ROWS": 256}),
        (kernels._gather, {"BLOCK": 128}),
        (kernels._gather, {"BLOCK": 128, "rows": None}),
    ):
        assert compiled_for(capability, kernel, kinds, constants, other="*i32")["cubin"]


def test_the_kernels_are_the_definition() -> None:
    assert "batches agree" in interpreted(__file__)


def in_the_interpreter() -> None:
    import torch

    from vllm_diffusion.engine.attention import kernels as attention_kernels
    from vllm_diffusion.engine.attention import ranges as attention_ranges

    pick = torch.Generator().manual_seed(5)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=pick, dtype=torch.int32)

    for case in range(40):
        count = (1, 2, 5, 130)[case % 4]
        rows = below(600 if case % 3 else 20, count)
        rows[below(count, count // 4).long()] = 0  # padding
        lens = rows + below(3000, count)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), rows.cumsum(0).int()))
        causal = below(2, count)
        tokens = int(starts[-1]) + int(below(700, 1))
        window, block = (1, 20, 1024)[case % 3], (16, 24, 32)[case % 3]
        table = below(10**6, count + 3, 1 + int(below(300, 1)))[:, ::1]
        slots, phase = torch.randperm(2 * count, generator=pick)[:count], below(2, 2 * count) == 1
        parts = 2 * count
        request, behind, text = below(count, parts), below(20, parts), below(3, parts) - 1
        results = []
        for form in (attention_ranges, attention_kernels):
            seen = torch.full((count, 1, 2), -9, dtype=torch.int32)
            form.write_sequence_ranges(causal, starts, lens, window, seen)
            ranges = torch.full((tokens, 2), -9, dtype=torch.int32)
            view, first = torch.full((2, count), -9, dtype=torch.int32)
            form.write_row_ranges(
                causal, starts, lens, window, block, int(rows.max()), ranges, view, first
            )
            cut = torch.full((2, count, 400), -9, dtype=torch.int32)
            tables = table, table.flip(0)
            form.gather_blocks(tables, [one[:, :90] for one in cut], first=first)
            whole = torch.full((parts, table.shape[1]), -9, dtype=torch.int32)
            form.gather_blocks([table], [whole], rows=request)
            flags = torch.full((3, count + 7), -9, dtype=torch.int32)
            form.mark_sequences(phase, slots, flags[0])
            form.mark_sequences(phase, slots, flags[1, :count], text=text[:count].clamp(min=0))
            part_flags, part_lens = torch.full((2, parts), -9, dtype=torch.int32)
            form.mark_parts(phase, slots, lens, request, behind, text, part_flags, part_lens)
            results.append((seen, ranges, view, first, cut, whole, flags, part_flags, part_lens))
        for name, (definition, kernel) in enumerate(zip(*results, strict=True)):
            assert torch.equal(definition, kernel), (case, name)
    print("40 batches agree")


if __name__ == "__main__":
    in_the_interpreter()
