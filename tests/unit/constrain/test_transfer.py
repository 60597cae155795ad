"""Tensors arrive unchanged when several are copied at once."""

from __future__ import annotations

import torch

from vllm_diffusion.constrain.transfer import on_device, packed, to_device, unpacked

CPU = torch.device("cpu")


def test_tensors_of_any_kind_come_back_from_one_row_of_bytes() -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.randn(2, 3).T,  # not contiguous
        "ids": torch.arange(5),
        "none": torch.empty(0, 4),
        "exact": torch.randn(3, dtype=torch.float64),
        "one": torch.tensor(7, dtype=torch.int32),
    }
    flat = packed(tensors)
    assert flat.numel() == 3 + 6 * 4 + 5 * 8 + 3 * 8 + 4
    again = unpacked(flat, tensors)
    assert again.keys() == tensors.keys()
    for name, values in tensors.items():
        assert again[name].dtype == values.dtype
        assert torch.equal(again[name], values), name


def test_nothing_is_copied_where_all_is_there() -> None:
    values = on_device([1, 2], CPU)
    assert to_device({"values": values}, CPU)["values"] is values
    assert on_device([0.5], CPU, torch.float32).dtype == torch.float32
