"""From worker to scheduler: what is known about the canvases that a step commits.

The worker must not wait for the device to say why a canvas stopped. vLLM copies a step's tokens to
the host asynchronously, and with them whatever stands in ``sampling_mask_tensors``: it calls
``to_cpu_nonblocking`` on it beside its own copies and ``tolists`` when they have arrived, and hands
the result to the scheduler as ``sampling_masks``. A canvas has no sampling mask (asking for one is
refused at start), so that place is free, and the record travels with the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_diffusion.records import StopReason
from vllm_diffusion.telemetry import KEY, CanvasReport, Meter, is_asked

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from torch import Tensor
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

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


class StepMeter:
    """Counts what the requests of a scheduler run, and lets a report leave with their tokens."""

    def __init__(self) -> None:
        self._meter = Meter()

    def take(
        self,
        scheduled: SchedulerOutput,
        output: ModelRunnerOutput,
        requests: dict[str, Request],
        *,
        committing: AbstractSet[str],
        everybody: bool,
    ) -> dict[str, CanvasReport]:
        """Count a step that ran and take the worker's record off its output.

        A request that is gone, such as one that ended while the step was in flight, does not count.

        Args:
            scheduled: what the step was to run.
            output: what came of it; loses the worker's record.
            requests: those the scheduler knows.
            committing: those whose rows did nothing but commit a canvas.
            everybody: count all requests, for the metrics, rather than only those that ask.

        Returns:
            the canvas of every counted request that committed one.
        """
        by_index: Any = output.sampling_masks or {}
        output.sampling_masks = None
        committed = {}
        for request_id in scheduled.scheduled_spec_decode_tokens.keys() | committing:
            if (request := requests.get(request_id)) is None or request.sampling_params is None:
                continue
            asked = is_asked(request.sampling_params.extra_args)
            if not (asked or everybody):
                continue
            rows = scheduled.num_scheduled_tokens[request_id]
            self._meter.ran(request_id, rows=rows, commits=request_id in committing, asked=asked)
            if (index := output.req_id_to_index[request_id]) in by_index:
                committed[request_id] = by_index[index]
        return committed

    def send(
        self,
        outputs: dict[int, EngineCoreOutputs],
        committed: dict[str, CanvasReport],
        requests: dict[str, Request],
    ) -> None:
        """Add a report to every output that leaves; ``patches.telemetry_outputs`` takes it off.

        ``kv_transfer_params`` is the one field of an output that takes what vLLM does not know.
        """
        for group in outputs.values():
            for output in group.outputs:
                canvas = committed.get(output.request_id) if output.new_token_ids else None
                report = self._meter.report(output.request_id, canvas)
                if report is not None:
                    params = output.kv_transfer_params or {}
                    output.kv_transfer_params = {**params, KEY: report.to_wire()}
        self._meter.keep(requests.keys())
