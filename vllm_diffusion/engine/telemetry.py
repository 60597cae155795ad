"""What requests run, counted beside the scheduler; a report leaves with their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.engine import carriers
from vllm_diffusion.telemetry import Meter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_diffusion.request.admitted import Admitted
    from vllm_diffusion.telemetry import CanvasReport


class StepMeter:
    """Counts what the requests of a scheduler run, and lets a report leave with their tokens."""

    def __init__(self) -> None:
        self._meter = Meter()

    def take(
        self,
        scheduled: SchedulerOutput,
        output: ModelRunnerOutput,
        requests: dict[str, Request],
        admitted: Mapping[Request, Admitted],
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
            admitted: what they ask for.
            committing: those whose rows did nothing but commit a canvas.
            everybody: count all requests, for the metrics, rather than only those that ask.

        Returns:
            the canvas of every counted request that committed one.
        """
        by_index = carriers.take_committed(output)
        committed = {}
        for request_id in scheduled.scheduled_spec_decode_tokens.keys() | committing:
            if (request := requests.get(request_id)) is None or request not in admitted:
                continue
            asked = admitted[request].telemetry
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
        """Add a report to every output that leaves; ``patches.telemetry_outputs`` takes it off."""
        for group in outputs.values():
            for output in group.outputs:
                canvas = committed.get(output.request_id) if output.new_token_ids else None
                report = self._meter.report(output.request_id, canvas)
                if report is not None:
                    carriers.put_report(output, report)
        self._meter.keep(requests.keys())
