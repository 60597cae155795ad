"""An admitted request as the engine knows it: one frozen record, made where the request enters.

Takes options that ``parse`` has let through, and the rows of their text. The record travels as
plain values, see ``engine.carriers``. Scheduler and worker read it when the request arrives; nobody
looks at an option after that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.constraints import Holes
from vllm_diffusion.denoise.constants import KINDS
from vllm_diffusion.request.options import requested_rule
from vllm_diffusion.request.text import NOISE_LEVEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.denoise.constants import RuleConstants, ServedRules
    from vllm_diffusion.request.options import DiffusionParams
    from vllm_diffusion.request.text import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What scheduler and worker know of a request beside its sampling parameters."""

    rule: RuleConstants
    """The rule its canvases are denoised by."""
    canvas_length: int | None = None
    """Width of its canvases, at most the served one; None: the served one."""
    seed_canvas: tuple[int, ...] = ()
    """Token ids of the first input, one a position from the first canvas on; -1 in a hole."""
    pinned: tuple[int, ...] = ()
    """Positions of the seed canvas whose token is given."""
    holes: Holes | None = None
    """Of a text with holes."""
    noise_level: float | None = None
    """Share of noise in the seed canvas; None: the seed canvas as it is."""
    read_only: bool = False
    """One canvas is the whole answer."""
    constrained: bool = False
    """Only ``logprob_token_ids`` may be said."""
    fused_commit: bool | None = None
    """Whether commits share a forward with the next canvas; None: as the engine is served."""
    approximate_prefix: bool = False
    """Text that sees its canvas is computed once a canvas, not in every step."""
    telemetry: bool = False
    """The answer says what its canvases took."""

    def answer_rows(self, max_tokens: int) -> int:
        """Rows behind the prompt that the answer takes, together with what follows it.

        Args:
            max_tokens: of the answer.
        """
        return max(max_tokens, 0 if self.holes is None else len(self.seed_canvas))

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for vLLM's serializer."""
        values = _fields(self)
        values["rule"] = {"kind": self.rule.kind, **_fields(self.rule)}
        values["holes"] = None if self.holes is None else _fields(self.holes)
        return values

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> Admitted:
        """Read what ``to_wire`` wrote, on the other side of a serializer that has no tuples."""
        values = dict(wire)
        constants = dict(values["rule"])
        values["rule"] = KINDS[constants.pop("kind")](**constants)
        if values["holes"] is not None:
            values["holes"] = Holes(**values["holes"])
        for name in ("seed_canvas", "pinned"):
            values[name] = tuple(values[name])
        return Admitted(**values)


def admitted(params: DiffusionParams, served: ServedRules, rows: Rows | None = None) -> Admitted:
    """What the engine gets of a request.

    Args:
        params: its options.
        served: the rules of the engine.
        rows: of its text, if it has any.
    """
    noise_level, holes = params.noise_level, None
    seed_canvas, pinned = params.seed_canvas, params.pinned
    if rows is not None:
        seed_canvas, pinned, holes = rows.seed_canvas, rows.pinned, rows.holes
        if holes is None and noise_level is None:
            noise_level = NOISE_LEVEL
    return Admitted(
        rule=requested_rule(params, served),
        canvas_length=params.canvas_length,
        seed_canvas=seed_canvas,
        pinned=pinned,
        holes=holes,
        noise_level=noise_level,
        read_only=params.read_only,
        constrained=params.constrained,
        fused_commit=params.fused_commit,
        approximate_prefix=params.approximate_prefix,
        telemetry=params.telemetry,
    )


def _fields(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """The fields of a record by name, as they are: their values are plain."""
    return {each.name: getattr(record, each.name) for each in fields(record)}
