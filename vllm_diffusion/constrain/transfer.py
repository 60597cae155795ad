"""Copies between host and device: one at a time, and none towards a GPU that waits for it.

A copy from unpinned memory waits for the device, and so does every copy from the device. A step
therefore reads all it needs in one copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def on_device(
    values: Sequence[float] | Sequence[Sequence[float]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Numbers of the host as a tensor on the device."""
    return upload(torch.tensor(values, dtype=dtype), device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device; do not change it afterwards."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors of one device to another, by name, in one copy.

    From a GPU to the host it waits; the other way it does not.
    """
    if all(values.device == device for values in tensors.values()):
        return dict(tensors)
    flat = packed(tensors)
    flat = upload(flat, device) if flat.device.type == "cpu" else flat.to(device)
    return unpacked(flat, tensors)


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """[N] uint8, the bytes of all tensors."""
    return torch.cat([values.reshape(-1).view(torch.uint8) for _, values in _in_order(tensors)])


def unpacked(flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of ``flat``, which ``packed`` made from tensors of these shapes and dtypes."""
    named = _in_order(tensors)
    parts = torch.split(flat, [values.numel() * values.element_size() for _, values in named])
    return {
        name: part.view(values.dtype).view(values.shape)
        for part, (name, values) in zip(parts, named, strict=True)
    }


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    # The widest numbers first, so that each of them begins at a multiple of its own size.
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())
