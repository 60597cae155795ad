"""The content of a trace and its file format.

The file is an npz: a header in JSON and one array per field. It is compressed because argmax and
sample change little from step to step; safetensors does not compress. Arrays by position
concatenate all steps (P = sum of the widths of N steps); ``accepted`` is packed to bits. Which
arrays there are depends on the kind of rule.
"""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np

from vllm_diffusion import __version__
from vllm_diffusion.denoise.constants import (
    KINDS,
    EntropyBoundConstants,
    RevealConstants,
    RuleConstants,
)
from vllm_diffusion.errors import TraceError
from vllm_diffusion.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_ARCHIVE: Final = b"PK"  # first bytes of every npz

FORMAT: Final = 1
"""Incremented when a field changes; a reader accepts only its own format."""

_OF_STEPS: Final = {
    "start": np.int32,
    "step": np.int32,
    "width": np.int32,
    "committing": np.bool_,
    "finished": np.bool_,
    "input_crc": np.uint32,
}
_OF_POSITIONS: Final = {
    "argmax": np.int32,
    "sample": np.int32,
    "entropy": np.float32,
    "top_prob": np.float32,
    "margin": np.float32,
}
_OF_KIND: Final[Mapping[str, Mapping[str, type]]] = {
    RevealConstants.kind: {"tokens": np.int32, "score": np.float32},
}
"""Arrays by position that only one kind of rule has."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One forward of a canvas that is W positions wide.

    A commit writes the KV of a finished canvas. Its argmax is that of the canvas's last step (the
    committed tokens, unless a text with holes had slack), and the other values are 0, because
    commit rows have no distribution.

    Under ``reveal`` the argmax is the canvas after the step, as in the pool, and ``accepted`` are
    the positions that were revealed in it.
    """

    start: int  # absolute position of the first row
    step: int  # step of the schedule; a canvas that begins from a draft starts above 0
    committing: bool  # whether this is a commit rather than a denoising step
    finished: bool  # the rule stopped here; without fused commits the next forward commits
    input_crc: int  # ``checksum`` of the input canvas
    argmax: NDArray[np.int32]  # [W]
    sample: NDArray[np.int32]  # [W]
    entropy: NDArray[np.float32]  # [W], nats
    top_prob: NDArray[np.float32]  # [W]
    margin: NDArray[np.float32]  # [W], top probability minus the second
    accepted: NDArray[np.bool_]  # [W]
    tokens: NDArray[np.int32] | None = None  # [W], input; ``reveal`` alone
    score: NDArray[np.float32] | None = None  # [W], see ``denoise.score``; ``reveal`` alone

    @property
    def width(self) -> int:
        """W."""
        return len(self.argmax)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canvas:
    """One canvas from its first denoising step to its end or interruption."""

    steps: tuple[Step, ...]
    """The denoising steps; at least one."""
    commit: Step | None
    """None if commits are fused or the request was preempted, aborted or closed first."""
    tokens: NDArray[np.int32] | None
    """[W], its final argmax; None if the request was interrupted first."""

    @property
    def start(self) -> int:
        """Absolute position of the first token."""
        return self.steps[0].start

    @property
    def width(self) -> int:
        """Number of tokens."""
        return self.steps[0].width

    @property
    def finished(self) -> bool:
        """Whether the rule stopped; otherwise there is no commit."""
        return self.steps[-1].finished


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """All steps of one request while it held a slot, in order."""

    request_id: str
    seed: int  # 64-bit key of the request's noise
    rule: RuleConstants  # of this request
    family: Family  # that the rule was made for
    ends: tuple[int, ...] = ()  # ids that end a canvas early; ``reveal`` alone
    scored_by: str | None = None  # what the scores of its steps are; ``reveal`` alone
    vocab_size: int
    canvas_length: int  # L of the pool; a canvas may be narrower
    plugin_version: str  # version that recorded it
    prompt_length: int = 0  # tokens
    seed_canvas: tuple[int, ...] = ()  # first input after the prompt instead of noise; -1 is noise
    guarded: bool = False  # bad words or a parser may have prevented a canvas from finishing
    fused: bool = False  # a canvas ends with its last step; its commit is not a separate step
    steps: tuple[Step, ...] = ()

    @property
    def canvases(self) -> tuple[Canvas, ...]:
        """The steps grouped by canvas."""
        grouped: list[list[Step]] = []
        for step in self.steps:
            if not grouped or self._ends(grouped[-1][-1]):
                grouped.append([])
            grouped[-1].append(step)
        return tuple(
            Canvas(
                steps=tuple(step for step in steps if not step.committing),
                commit=steps[-1] if steps[-1].committing else None,
                tokens=steps[-1].argmax if self._ends(steps[-1]) else None,
            )
            for steps in grouped
        )

    def _ends(self, step: Step) -> bool:
        return step.finished if self.fused else step.committing


def checksum(tokens: NDArray[np.int32]) -> int:
    """CRC-32 of a canvas's tokens, [W].

    A step stores only this of its input. The tokens follow from seed and decisions, so a replay
    regenerates and verifies them; storing their noise would double the file.
    """
    return zlib.crc32(tokens.astype("<i4").tobytes())


def to_bytes(trace: Trace) -> bytes:
    """The file content for a trace, which ``load`` reads."""
    header = {
        "format": FORMAT,
        "plugin_version": trace.plugin_version,
        "request_id": trace.request_id,
        "seed": trace.seed,
        "kind": trace.rule.kind,
        "rule": asdict(trace.rule),
        "family": trace.family.to_dict(),
        "ends": trace.ends,
        "scored_by": trace.scored_by,
        "vocab_size": trace.vocab_size,
        "canvas_length": trace.canvas_length,
        "prompt_length": trace.prompt_length,
        "seed_canvas": trace.seed_canvas,
        "guarded": trace.guarded,
        "fused": trace.fused,
    }
    steps = trace.steps
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "accepted": np.packbits(np.concatenate([step.accepted for step in steps])),
    }
    for name, dtype in _OF_STEPS.items():
        arrays[name] = np.array([getattr(step, name) for step in steps], dtype)
    for name, dtype in _of_positions(trace.rule.kind).items():
        arrays[name] = np.concatenate([getattr(step, name) for step in steps], dtype=dtype)
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _of_positions(kind: str) -> dict[str, type]:
    return {**_OF_POSITIONS, **_OF_KIND.get(kind, {})}


def load(path: Path | str) -> Trace:
    """Read a recorded trace.

    Raises:
        OSError: the file cannot be read.
        TraceError: it is not a trace, is damaged, or is of another format.
    """
    content = Path(path).read_bytes()
    try:
        if not content.startswith(_ARCHIVE):  # numpy's message would be about pickles
            raise ValueError("it is not an npz archive" if content else "it is empty")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return _parse(archive)
    except _DAMAGE as error:
        raise TraceError(
            f"{path} is not a complete trace of format {FORMAT}, which vllm-diffusion "
            f"{__version__} reads: {str(error).rstrip('.')}. Record it again with "
            "VLLM_DIFFUSION_TRACE=DIR."
        ) from error


# Raised by numpy, zipfile and zlib for files of another type, truncated or damaged files.
_DAMAGE: Final = (
    BadZipFile,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)


def _parse(arrays: Mapping[str, NDArray[Any]]) -> Trace:
    """Build a trace from the arrays, checking everything that readers rely on.

    Raises:
        ValueError, KeyError, TypeError: something is missing or inconsistent.
    """
    header = json.loads(arrays["header"].tobytes())
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, by {header['plugin_version']}")
    # Recordings made before a second rule existed lack these keys.
    kind = header.get("kind", EntropyBoundConstants.kind)
    family = header.get("family")
    by_position = _of_positions(kind)
    width = arrays["width"]
    bounds = np.concatenate([[0], np.cumsum(width, dtype=np.int64)])
    count, positions = len(width), int(bounds[-1])
    columns: dict[str, NDArray[Any]] = {}
    for wanted, size in ((_OF_STEPS, count), (by_position, positions)):
        for name, dtype in wanted.items():
            columns[name] = array = arrays[name]
            if array.dtype != dtype or array.shape != (size,):
                raise ValueError(
                    f"{name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}({size},)"
                )
    packed = arrays["accepted"]
    if packed.shape != (-(-positions // 8),):
        raise ValueError(f"accepted has {packed.shape} bytes for {positions} positions")
    columns["accepted"] = np.unpackbits(packed, count=positions).astype(np.bool_)
    # Recordings made before fused commits existed lack the key.
    fused = header.get("fused", False)
    # A canvas begins at the start of the recording or after the end of another canvas.
    commits, steps = columns["committing"], columns["step"]
    if not count or commits[0] or (commits[1:] & (commits[:-1] | fused)).any():
        raise ValueError("a canvas without a beginning")
    ends = columns["finished"] if fused else commits
    if ((np.diff(steps) != 1) & ~ends[:-1]).any():
        raise ValueError("a canvas with steps missing")
    if width.min() < 1 or width.max() > header["canvas_length"]:
        raise ValueError(f"widths {width.min()}..{width.max()} of {header['canvas_length']}")

    def step(index: int) -> Step:
        rows = slice(bounds[index], bounds[index + 1])
        return Step(
            start=int(columns["start"][index]),
            step=int(columns["step"][index]),
            committing=bool(columns["committing"][index]),
            finished=bool(columns["finished"][index]),
            input_crc=int(columns["input_crc"][index]),
            accepted=columns["accepted"][rows],
            **{name: columns[name][rows] for name in by_position},
        )

    return Trace(
        request_id=header["request_id"],
        seed=header["seed"],
        rule=KINDS[kind](**header["rule"]),
        ends=tuple(header.get("ends", ())),
        scored_by=header.get("scored_by"),
        family=Family(name="", rule=kind) if family is None else Family.from_dict(family),
        vocab_size=header["vocab_size"],
        canvas_length=header["canvas_length"],
        plugin_version=header["plugin_version"],
        prompt_length=header["prompt_length"],
        seed_canvas=tuple(header["seed_canvas"]),
        guarded=header["guarded"],
        fused=fused,
        steps=tuple(step(index) for index in range(count)),
    )
