"""What is known about the canvases that a step commits, on its way from the device to the host.

How it travels stands in ``engine.carriers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.records import StopReason
from vllm_diffusion.telemetry import CanvasReport

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.records import Emission


@dataclass(frozen=True, slots=True)
class CommittedCanvases:
    """[num_reqs, 3] int32: steps, reason, and the bits of the fp32 entropy; 0 without a commit."""

    facts: Tensor

    @staticmethod
    def of(emission: Emission, index: Tensor, num_reqs: int) -> CommittedCanvases:
        """Take an emission's record to the requests of the step.

        Args:
            emission: of B canvases.
            index: [B] int64, the request of each.
            num_reqs: requests in the step.
        """
        facts = torch.zeros(num_reqs, 3, dtype=torch.int32, device=index.device)
        columns = [emission.steps.int(), emission.reason.int(), emission.entropy.view(torch.int32)]
        facts[index] = torch.stack(columns, dim=1)
        return CommittedCanvases(facts)

    def to_cpu_nonblocking(self) -> CommittedCanvases:
        """Start the copy; vLLM waits for it where it waits for the tokens."""
        return CommittedCanvases(self.facts.to("cpu", non_blocking=True))

    def tolists(self, num_sampled: np.ndarray) -> dict[int, CanvasReport]:
        """The canvases that were committed, by the index of their request in the step.

        Args:
            num_sampled: [num_reqs], tokens each request gained.
        """
        index = np.flatnonzero(num_sampled)
        if not index.size:
            return {}
        facts = self.facts.numpy()[index]
        entropy = facts[:, 2].copy().view(np.float32)
        rows = zip(
            index.tolist(),
            facts[:, :2].tolist(),
            entropy.tolist(),
            num_sampled[index].tolist(),
            strict=True,
        )
        return {
            request: CanvasReport(
                steps=steps,
                stopped_by=StopReason(reason).name.lower(),
                # JSON has no NaN, and one broken canvas must not break an answer.
                entropy=nats if isfinite(nats) else None,
                tokens=tokens,
            )
            for request, (steps, reason), nats, tokens in rows
        }
