"""Recorder: observes ``step.advance`` and writes one file per request.

While on, each step copies some 30 bytes per position to the host, which syncs with the device.
They stay in host memory until the request leaves its slot; the file is compressed and written in
that step. While off there is no recorder, and a step tests one attribute.
"""

from __future__ import annotations

import itertools
import logging
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from vllm_diffusion import __version__
from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.denoise.constants import RevealConstants
from vllm_diffusion.denoise.score import scores
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.rules.reveal import asked_of
from vllm_diffusion.trace.file import Step, Trace, checksum, to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.family import Family
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision

# vLLM's log handlers apply only to loggers under its name.
logger = logging.getLogger(f"vllm.{__name__}")

VARIABLE: Final = "VLLM_DIFFUSION_TRACE"

_LONGEST_STEM: Final = 120  # characters of a file name; file systems allow 255 bytes


def trace_folder(environment: Mapping[str, str]) -> Path | None:
    """The folder that ``VLLM_DIFFUSION_TRACE`` names, created if missing; None if unset.

    Raises:
        ConfigError: it cannot be written to.
    """
    if not (asked := environment.get(VARIABLE)):
        return None
    folder = Path(asked).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Try it: permission bits do not account for root, read-only or full file systems.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{VARIABLE}={asked} is not a folder that traces can be written to ({error}); "
            "name another one, or unset it to record nothing."
        ) from error
    return folder


@dataclass(frozen=True, slots=True)
class _Recording:
    """The recording of a request that holds a slot."""

    header: Trace  # without steps
    steps: list[Step] = field(default_factory=list)


class Recorder:
    """Records slots from ``begin`` to ``end``.

    A preempted request leaves its slot and later gets another, so it has one file per scheduling
    episode. If a canvas was interrupted, the next file starts that canvas over.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self._folder, self._family = folder, family
        self._open: dict[int, _Recording] = {}

    def begin(
        self,
        pool: CanvasPool,
        slot: int,
        request_id: str,
        *,
        constraints: Constraints | None = None,
        prompt_length: int = 0,
        guarded: bool = False,
    ) -> None:
        """Start recording a request that was admitted to a slot; syncs with the device.

        Only those constraints are recorded that a replay cannot derive from the statistics.
        ``guarded`` means that a parser enforces one of them.
        """
        asked, rule = constraints or Constraints(), pool.owners[slot]
        low, high = pool.seed[slot].tolist()
        header = Trace(
            request_id=request_id,
            seed=low | high << 32,
            rule=rule,
            family=self._family,
            ends=()
            if pool.ends is None
            else tuple(token for token in pool.ends[slot].tolist() if token >= 0),
            scored_by=rule.reveal_by if isinstance(rule, RevealConstants) else None,
            vocab_size=pool.vocab_size,
            canvas_length=pool.canvas_length,
            plugin_version=__version__,
            prompt_length=prompt_length,
            seed_canvas=tuple(asked.seed_canvas),
            guarded=guarded or bool(asked.bad_words),
            fused=bool(pool.fused[slot]),
        )
        self._open[slot] = _Recording(header)

    def observe(
        self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats, decision: Decision
    ) -> None:
        """Record one step of every canvas of the batch; a ``step.Observer``."""
        slots = batch.slots
        committing = pool.causal[slots]
        row_committing = committing[:, None]

        def kept(of_denoising: Tensor, of_commit: Tensor | int = 0) -> NDArray[Any]:
            return _to_host(torch.where(row_committing, of_commit, of_denoising))

        canvas = _to_host(pool.tokens[slots].int())
        said, score = stats.argmax, None
        if reveals := pool.mask_id is not None:
            finished = decision.finished[:, None]
            said = torch.where(finished, decision.commit.tokens, decision.next_tokens)
            score = kept(_scores(pool, batch, stats))
        argmax = kept(said.int(), pool.argmax[slots].int())
        sample = kept(stats.sample.int())
        entropy, top_prob, margin = kept(stats.entropy), kept(stats.top_prob), kept(stats.margin)
        accepted = kept(decision.accept, of_commit=False)
        of_rows = torch.stack(
            [
                slots.long(),
                batch.position[:, 0],
                batch.width,
                pool.step[slots],
                committing.long(),
                (decision.finished & ~committing).long(),
            ],
            dim=1,
        )
        for row, (slot, start, width, step, commits, finished) in enumerate(of_rows.tolist()):
            if slot not in self._open:
                continue
            # Copies: a view would keep the whole batch in memory as long as the request.
            self._open[slot].steps.append(
                Step(
                    start=start,
                    step=step,
                    committing=bool(commits),
                    finished=bool(finished),
                    input_crc=checksum(canvas[row, :width]),
                    argmax=argmax[row, :width].copy(),
                    sample=sample[row, :width].copy(),
                    entropy=entropy[row, :width].copy(),
                    top_prob=top_prob[row, :width].copy(),
                    margin=margin[row, :width].copy(),
                    accepted=accepted[row, :width].copy(),
                    tokens=canvas[row, :width].copy() if reveals else None,
                    score=None if score is None else score[row, :width].copy(),
                )
            )

    def end(self, slot: int) -> None:
        """Write the recording of a slot that its request has left. Never raises OSError."""
        recording = self._open.pop(slot, None)
        if recording is None or not recording.steps:
            return
        trace = replace(recording.header, steps=tuple(recording.steps))
        try:
            self._write(trace)
        except OSError as error:
            logger.warning("The trace of request %r is lost: %s", trace.request_id, error)

    def close(self) -> None:
        """End every recording; requests may still be running when the engine closes."""
        for slot in list(self._open):
            self.end(slot)

    def _write(self, trace: Trace) -> None:
        content = to_bytes(trace)
        for name in file_names(trace.request_id):
            path = self._folder / name
            try:
                file = path.open("xb")
            except FileExistsError:
                continue
            try:
                with file:
                    file.write(content)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            return


def file_names(request_id: str) -> Iterator[str]:
    """Names for a request's files: ``ID.npz``, ``ID.1.npz``, ``ID.2.npz`` ...

    The client chooses the request id. Anything that could lead out of the folder, hide the file or
    be refused by a file system is replaced; the trace itself stores the id unchanged.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", request_id).lstrip(".") or "request"
    if len(stem) > _LONGEST_STEM:
        # Keep the end, where vLLM makes ids unique.
        stem = f"{stem[: _LONGEST_STEM // 2]}_{stem[-_LONGEST_STEM // 2 :]}"
    yield f"{stem}.npz"
    for number in itertools.count(1):
        yield f"{stem}.{number}.npz"


def _scores(pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Tensor:
    """[B, L] fp32, what ``reveal`` ranks the positions by."""
    slots = batch.slots
    return scores(
        pool.constants.reveal_by[slots],
        asked_of(pool),
        stats,
        pool.seed[slots],
        batch.position,
        pool.step[slots],
    )


def _to_host(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy(force=True)
