"""vLLM's Prometheus logger, with the histograms and counters of canvases beside its own.

vLLM's entry points for further loggers (`vllm.stat_logger_plugins`) will not do: a logger that
comes through them overrides `--disable-log-stats` for every model of the environment, and vLLM's
own logger, which is made after it, unregisters every metric whose name begins with `vllm:`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Histogram

from vllm_diffusion.denoise.constants import MAX_STEPS
from vllm_diffusion.engine import carriers
from vllm_diffusion.records import StopReason

if TYPE_CHECKING:
    from vllm_diffusion.telemetry import IterationReports

LABELS: Final = ["model_name", "engine"]

STEPS: Final = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 128, 256, MAX_STEPS)
TOKENS_PER_FORWARD: Final = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128)
ENTROPY: Final = (0.0001, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.02, 0.05,
                  0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # fmt: skip
"""Nats, dense around 0.005, below which the published rule stops."""


def count_canvases(logger: Any) -> type:
    """Derive a logger from vLLM's that also counts the canvases of a diffusion model.

    For the place where vLLM's `StatLoggerManager` looks its own logger up.
    """

    class CanvasPrometheusStatLogger(logger):
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            super().__init__(vllm_config, engine_indexes)
            # Only now: the base class unregisters every metric of an earlier logger.
            model = vllm_config.model_config
            self._canvases = (
                CanvasMetrics(model.served_model_name, self.engine_indexes)
                if model.is_diffusion
                else None
            )

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
            if self._canvases is None or iteration_stats is None:
                return
            if (seen := carriers.iteration_reports(iteration_stats)) is not None:
                self._canvases.observe(seen, engine_idx)

    return CanvasPrometheusStatLogger


class CanvasMetrics:
    """The metrics of docs/telemetry.md, for the engines of one logger."""

    def __init__(self, model_name: Any, engine_indexes: list[int]) -> None:
        engines = {index: [model_name, str(index)] for index in engine_indexes}
        steps = _histogram(
            "denoise_steps_per_canvas", "Denoising steps of a committed canvas.", STEPS
        )
        entropy = _histogram(
            "canvas_entropy", "Mean entropy of a canvas in its last step, in nats.", ENTROPY
        )
        tokens = _histogram(
            "tokens_per_forward",
            "Tokens of a finished answer by its forwards after the prompt's.",
            TOKENS_PER_FORWARD,
        )
        canvases = Counter(
            "vllm:diffusion_canvases", "Committed canvases, by what stopped them.",
            labelnames=[*LABELS, "reason"],
        )  # fmt: skip
        forwards = Counter(
            "vllm:diffusion_forwards", "Forwards of a canvas, the prompt's excluded.",
            labelnames=[*LABELS, "kind"],
        )  # fmt: skip
        self._steps = {index: steps.labels(*names) for index, names in engines.items()}
        self._entropy = {index: entropy.labels(*names) for index, names in engines.items()}
        self._tokens = {index: tokens.labels(*names) for index, names in engines.items()}
        self._canvases = {
            (index, reason): canvases.labels(*names, reason)
            for index, names in engines.items()
            for reason in (each.name.lower() for each in StopReason)
        }
        self._forwards = {
            (index, kind): forwards.labels(*names, kind)
            for index, names in engines.items()
            for kind in ("denoise", "commit")
        }

    def observe(self, seen: IterationReports, engine: int) -> None:
        """Count what an iteration of one engine reported."""
        for report in seen.reports:
            self._forwards[engine, "denoise"].inc(report.denoise_forwards)
            self._forwards[engine, "commit"].inc(report.commit_forwards)
            if (canvas := report.canvas) is not None:
                self._steps[engine].observe(canvas.steps)
                self._canvases[engine, canvas.stopped_by].inc()
                if canvas.entropy is not None:
                    self._entropy[engine].observe(canvas.entropy)
        for tokens, forwards in seen.finished:
            if forwards:
                self._tokens[engine].observe(tokens / forwards)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"vllm:diffusion_{name}", documentation, LABELS, buckets=buckets)


def logger_plugins_switch_statistics_on() -> bool:
    """Whether a stat logger plugin still overrules `--disable-log-stats`."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return "log_stats or has_custom_loggers" in inspect.getsource(AsyncLLM.__init__)
