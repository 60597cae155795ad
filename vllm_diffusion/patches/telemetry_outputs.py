"""The front end takes reports on canvases off the engine's outputs, for answers and for metrics.

vLLM passes what the scheduler knows to the client in records of fixed fields. A report travels in
the one free field (`engine.carriers`) and is taken off here, before anyone else looks at it. If
the request asked for it, its `CompletionOutput` then carries a `telemetry.Telemetry` as the
attribute `diffusion`. That is the same object from the first chunk to the last: vLLM merges chunks
that a slow client lets pile up field by field, and it must not matter which one survives.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from vllm_diffusion.engine import carriers
from vllm_diffusion.telemetry import IterationReports, Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(slots=True)
class _Collected:
    """What a request's state keeps: its telemetry so far, and whether the client asked for it."""

    telemetry: Telemetry = field(default_factory=Telemetry)
    asked: bool = False


_STATE = "_diffusion_telemetry"


def take_reports_off(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """Make `OutputProcessor.process_outputs` add reports to requests and to the statistics."""

    def reading(
        self: Any,
        engine_core_outputs: Sequence[Any],
        engine_core_timestamp: float | None = None,
        iteration_stats: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        seen = IterationReports()
        states = {}
        for output in engine_core_outputs:
            if (report := carriers.take_report(output)) is None:
                continue
            seen.reports.append(report)
            if (state := self.request_states.get(output.request_id)) is not None:
                collected = vars(state).setdefault(_STATE, _Collected())
                collected.asked = report.asked
                collected.telemetry.add(report)
                states[output.request_id] = state, collected.telemetry
        processed = process_outputs(
            self, engine_core_outputs, engine_core_timestamp, iteration_stats, *args, **kwargs
        )
        if iteration_stats is not None:
            for request_id, (state, telemetry) in states.items():
                if request_id not in self.request_states:
                    tokens = state.detokenizer.num_output_tokens()
                    seen.finished.append((tokens, telemetry.forwards))
            carriers.put_iteration_reports(iteration_stats, seen)
        return processed

    return reading


def tell_in_completions(new_completion: Callable[..., Any]) -> Callable[..., Any]:
    """Make `RequestState._new_completion_output` add the telemetry of a request that asked."""

    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_completion(self, *args, **kwargs)
        collected: _Collected | None = vars(self).get(_STATE)
        if collected is not None and collected.asked:
            carriers.put_telemetry(output, collected.telemetry)
        return output

    return telling


def outputs_have_no_free_field() -> bool:
    """Whether neither the engine's output nor the client's has a field for a plugin's data."""
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine import EngineCoreOutput

    borrowed = {"kv_transfer_params", "ec_transfer_params"}
    return _free_fields(EngineCoreOutput) == borrowed and not _free_fields(CompletionOutput)


def _free_fields(record: type) -> set[str]:
    """Names of the fields that are dictionaries of anything."""
    kinds = inspect.get_annotations(record, eval_str=True)
    return {name for name, kind in kinds.items() if dict[str, Any] in (kind, *get_args(kind))}
