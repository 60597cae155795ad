"""Where our data travels in vLLM's objects: every borrowed place, and who puts and takes what.

vLLM hands what it knows from process to process in records of fixed fields. What we have to say
beside them rides in these places, and nowhere else:

    what               place                                 put by              taken by
    Served             hf_config.vllm_diffusion              serving             every process
    Admitted           SamplingParams.extra_args             admission           scheduler, worker
    a constraint       SamplingParams.structured_outputs     admission           scheduler
    NamedConstraint    NewRequestData.sampling_params        scheduler           worker
    CommittedCanvases  SamplerOutput.sampling_mask_tensors   worker              vLLM
    CanvasReport       ModelRunnerOutput.sampling_masks      vLLM, of these      scheduler
    Report             EngineCoreOutput.kv_transfer_params   scheduler           front end
    Telemetry          CompletionOutput.diffusion            front end           answers, users
    IterationReports   IterationStats.diffusion              front end           metrics

This module knows the places and nothing of what becomes of their contents.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from vllm.sampling_params import StructuredOutputsParams

from vllm_diffusion.config import Served
from vllm_diffusion.request.admitted import Admitted
from vllm_diffusion.request.options import PREFIX
from vllm_diffusion.telemetry import KEY, IterationReports, Report

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import IterationStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from vllm_diffusion.denoise.constants import RuleConstants
    from vllm_diffusion.engine.committed import CommittedCanvases
    from vllm_diffusion.telemetry import CanvasReport, Telemetry

_SERVED: Final = "vllm_diffusion"

# No options of a request: one that brings them is refused.
_ADMITTED: Final = f"{PREFIX}admitted"
_CONSTRAINT: Final = f"{PREFIX}named_constraint"

_READ_BY_VLLM: Final = tuple(
    f"{PREFIX}{name}" for name in ("canvas_length", "max_steps", "read_only")
)
"""Options that vLLM's own scheduler looks at."""


# ---- to every process ----


def put_served(hf_config: PretrainedConfig, what: Served) -> None:
    """Let every process that gets the model's config know what is served.

    A config is written as JSON, so it holds plain values. vLLM itself reads the width of a canvas
    from the config, and it is one for all.
    """
    hf_config.canvas_length = what.canvas_length
    setattr(hf_config, _SERVED, what.to_dict())


def served(hf_config: PretrainedConfig) -> Served:
    """What is served with a model's config.

    Raises:
        AttributeError: it is not a model of ours.
    """
    return Served.from_dict(getattr(hf_config, _SERVED))


def is_served(hf_config: PretrainedConfig) -> bool:
    """Whether a model's config has been served before, or is."""
    return hasattr(hf_config, _SERVED)


# ---- from the front end to scheduler and worker ----


def put_admitted(sampling: SamplingParams, what: Admitted) -> None:
    """Send a record with a request, in the place of the options that it was made of.

    Args:
        sampling: the request's own; its client's may share ``extra_args`` with it.
        what: the record.
    """
    kept = {
        name: value
        for name, value in (sampling.extra_args or {}).items()
        if name in _READ_BY_VLLM or not name.startswith(PREFIX)
    }
    sampling.extra_args = {**kept, _ADMITTED: what.to_wire()}


def admitted(sampling: SamplingParams, rule: RuleConstants) -> Admitted:
    """The record of a request.

    Args:
        sampling: the request's.
        rule: served where none is asked for, as by the requests that vLLM makes to warm up.
    """
    wire = (sampling.extra_args or {}).get(_ADMITTED)
    return Admitted(rule=rule) if wire is None else Admitted.from_wire(wire)


def unread_options(sampling: SamplingParams) -> list[str]:
    """Options of a request that came without a record: nobody reads them any more."""
    extra = sampling.extra_args or {}
    if _ADMITTED in extra:
        return []
    return [name for name in extra if name.startswith(PREFIX) and name not in _READ_BY_VLLM]


def put_constraint(sampling: SamplingParams, sent: str) -> None:
    """Send a compiled constraint with a request, in the place of the one that was asked for.

    vLLM gives it to its backend, which is ours, as the text of a grammar.

    Args:
        sampling: the request's own.
        sent: see ``constraints.compiler.as_sent``.
    """
    compiled = StructuredOutputsParams(grammar=sent)
    # vLLM 0.33 wants a name, whatever backend the scheduler has put there.
    compiled._backend = "xgrammar"  # noqa: SLF001
    sampling.structured_outputs = compiled


# ---- from the scheduler to the worker ----


def put_named_constraint(new: NewRequestData, named: object) -> None:
    """Send a constraint to the worker with a request that it does not know.

    The scheduler's own copy of the options stays as it is: a request is sent again after
    preemption, and what its client may hold is not to be touched.
    """
    sampling = copy.copy(new.sampling_params)
    assert sampling is not None
    sampling.extra_args = {**(sampling.extra_args or {}), _CONSTRAINT: named}
    new.sampling_params = sampling


def named_constraint(new: NewRequestData) -> Any:
    """The constraint of a request, None if it has none."""
    sampling = new.sampling_params
    extra = sampling.extra_args if sampling is not None else None
    return (extra or {}).get(_CONSTRAINT)


# ---- from the worker to the scheduler ----


def put_committed(output: SamplerOutput, committed: CommittedCanvases | None) -> None:
    """Send what is known about the canvases that a step commits along with their tokens.

    The worker must not wait for the device to say why a canvas stopped. vLLM copies a step's tokens
    to the host asynchronously, and with them whatever stands here: it calls ``to_cpu_nonblocking``
    on it beside its own copies, and ``tolists`` when they have arrived. A canvas has no sampling
    mask, and asking for one is refused at start, so the place is free.
    """
    output.sampling_mask_tensors = committed


def take_committed(output: ModelRunnerOutput) -> dict[int, CanvasReport]:
    """Take the canvases of a step off its output, by the index of their request."""
    reports: Any = output.sampling_masks
    output.sampling_masks = None
    return reports or {}


# ---- from the scheduler to the front end ----


def put_report(output: EngineCoreOutput, report: Report) -> None:
    """Send a report with an output, in the one field that takes what vLLM does not know."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: report.to_wire()}


def take_report(output: EngineCoreOutput) -> Report | None:
    """Take a report off an output before vLLM shows the field to a client; None without one."""
    params = output.kv_transfer_params
    if not params or KEY not in params:
        return None
    report = Report.from_wire(params[KEY])
    output.kv_transfer_params = {name: params[name] for name in params if name != KEY} or None
    return report


# ---- from the front end to whoever reads answers and metrics ----


def put_telemetry(completion: CompletionOutput, telemetry: Telemetry) -> None:
    """Add an attribute to an answer, which has no field for it."""
    vars(completion)[KEY] = telemetry


def telemetry_of(completion: CompletionOutput) -> Telemetry | None:
    """The telemetry of an answer, None if its request did not ask."""
    told: Telemetry | None = vars(completion).get(KEY)
    return told


def put_iteration_reports(stats: IterationStats, seen: IterationReports) -> None:
    """Add what the metrics are to learn; vLLM hands the outputs of an iteration over in slices."""
    known: IterationReports = vars(stats).setdefault(KEY, IterationReports())
    known.reports.extend(seen.reports)
    known.finished.extend(seen.finished)


def iteration_reports(stats: IterationStats) -> IterationReports | None:
    """What the metrics learn of an iteration, None if there is nothing."""
    seen: IterationReports | None = vars(stats).get(KEY)
    return seen
