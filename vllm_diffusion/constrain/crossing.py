"""Numbers that cross between host and device: one copy, and towards a GPU without a wait.

A copy from memory that is not pinned waits for the device, and every copy from it does. What a step
must read it reads at once.
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
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; do not change it afterwards."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def together(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of one device on another, by name, in one copy.

    From a GPU to the host it waits; the other way it does not.
    """
    if all(values.device == device for values in tensors.values()):
        return dict(tensors)
    flat = packed(tensors)
    flat = sent(flat, device) if flat.device.type == "cpu" else flat.to(device)
    return unpacked(flat, tensors)


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """[N] uint8, all of their bytes."""
    return torch.cat([values.reshape(-1).view(torch.uint8) for _, values in _in_order(tensors)])


def unpacked(flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of ``flat``, which ``packed`` has made of tensors such as these."""
    named = _in_order(tensors)
    parts = torch.split(flat, [values.numel() * values.element_size() for _, values in named])
    return {
        name: part.view(values.dtype).view(values.shape)
        for part, (name, values) in zip(parts, named, strict=True)
    }


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    # The widest numbers first, so that each of them begins at a multiple of its own size.
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())
