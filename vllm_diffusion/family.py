"""What a family of diffusion language models declares, and what its model class offers.

``Family`` is everything that engine, sampler and rules need to know of a model beside its weights.
A model's folder makes it from the checkpoint (``models/<family>/family.py``), serving puts it into
the config, and scheduler and worker read the same record. Nothing outside ``models/`` asks which
family it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from vllm_diffusion.head.vocabulary import Vocabulary
    from vllm_diffusion.upstream.ledger import Patch


class Text(StrEnum):
    """Which rows of known text a row of known text sees."""

    CAUSAL = "causal"
    """Those before it. A canvas sees all text, and all of itself."""
    BLOCK = "block"
    """Those of its own block of the grid, and those before that block. A canvas is a block."""
    WHOLE = "whole"
    """All rows, the canvas among them. So no text counts as computed after a step."""


class Conditioning(StrEnum):
    """What a canvas row is told beside its token."""

    NONE = "none"
    SELF = "self"
    """The soft embedding that the step before left at its position."""
    TIME = "time"
    """How much noise is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family of models declares (host side); the defaults are the plainest answers."""

    name: str
    """The folder below ``models``."""
    rule: str
    """The published rule, ``RuleConstants.kind``."""
    mask_id: int | None = None
    """The token that absorbing noise is made of; None for uniform noise."""
    text: Text = Text.CAUSAL
    block: int | None = None
    """Positions of a block of the grid, which begins at position 0; None where there is no grid."""
    reads: int = 0
    """A position's logits stand this many rows away from it: 0, or -1 for the row before."""
    seeded: bool = False
    """A canvas begins with the token that the text row before it says."""
    horizon: bool = False
    """Rows of noise stand behind a canvas, as far as the answer may go."""
    edits: bool = False
    """A position that was revealed may change until its canvas is finished."""
    conditioning: Conditioning = Conditioning.NONE
    banned: tuple[int, ...] = ()
    """Ids that no text may hold."""
    ends: tuple[int, ...] = ()
    """Ids that end an answer."""
    unlisted_ends: tuple[int, ...] = ()
    """Those among them that no file of a checkpoint names as such, so that vLLM knows of none."""
    published: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Constants of the published rule that no file of a checkpoint gives, by their names in
    ``RuleConstants``; the family's module says where each was published."""
    tools: str | None = None
    """What makes the grammar of tool calls, a ``constrain.language.calls.CallMaker`` by the name
    ``module:function``; None where the family has no form of its own."""
    adapters: str | None = None
    """What LoRA adapters change, an ``engine.lora.form.AdapterForm`` by the name ``module:object``;
    None where none are served."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a config that is written as JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Family:
        """Read what ``to_dict`` wrote, also after it went through JSON."""
        lists = {name: tuple(values[name]) for name in ("banned", "ends", "unlisted_ends")}
        kinds = {
            "text": Text(values["text"]),
            "conditioning": Conditioning(values["conditioning"]),
        }
        return Family(**{**values, **lists, **kinds})


class FamilyModule(Protocol):
    """The module ``models/<family>/family.py``; importing it imports neither torch nor vLLM."""

    MODELS: Mapping[str, str]
    """Architecture, as config.json names it -> the model class, ``module:name``."""
    CONFIGS: Mapping[str, str]
    """Model type, as config.json names it -> the config class, ``module:name``, where Transformers
    has none. It answers ``canvas_length``, by which vLLM knows a diffusion model."""
    PATCHES: tuple[Patch, ...]
    """What the family changes in vLLM; they stand in the table of ``patches`` with the others."""

    def declare(self, config: Any, generation: Mapping[str, Any]) -> Family:  # noqa: ANN401
        """What a checkpoint is, from its config and generation config.

        Raises:
            CheckpointError: the checkpoint does not say what the family needs.
        """

    def settle(self, vllm_config: Any) -> None:  # noqa: ANN401
        """Set what vLLM itself sets for the backbone, before ours is set on top.

        Raises:
            CheckpointError: the checkpoint does not say how wide a canvas is.
            ConfigError: an option that the family cannot be served with.
        """


class CanvasModel(Protocol):
    """What engine and sampler ask of a model class, beside what vLLM asks of any."""

    sampler_takes_hidden: bool
    """The next ``compute_logits`` gives the hidden rows as they are, for the sampler."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[R, H] -> [R, vocab] fp32."""

    def vocabulary(self) -> Vocabulary | None:
        """This rank's part of the vocabulary for a head that streams; None if it cannot."""


class Normed(Protocol):
    """A root mean square norm, as its kernels read it."""

    weight: Tensor
    variance_epsilon: float


class SelfConditioning(Protocol):
    """A layer that computes ``post_norm(embedding + inner(pre_norm(soft embedding)))``."""

    pre_norm: Normed
    post_norm: Normed

    def inner(self, normed: Tensor) -> Tensor:
        """What stands between the norms: [R, H] -> [R, H]."""

    def __call__(self, embedding: Tensor, soft: Tensor) -> Tensor:
        """Embeddings [R, H] of canvas rows and their soft embeddings [R, H] -> [R, H]."""


class SelfConditionedModel(CanvasModel, Protocol):
    """What is asked beside that where a family's conditioning is SELF."""

    canvas_rows: Tensor
    """[max tokens, 1] bool, which rows of the forward are canvas rows; written before it."""
    self_conditioning: SelfConditioning
    adapters: Any
    """Told which rows are canvas rows, or None."""

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """[R, vocab] fp32 -> [R, H], the expected embedding."""

    def embed_text(self, input_ids: Tensor, out: Tensor) -> None:
        """Write the embeddings of [N] tokens into [N, H]."""

    def embed_input_ids(
        self, input_ids: Tensor, *, multimodal_embeddings: Sequence[Tensor], is_multimodal: Tensor
    ) -> Tensor:
        """[N] tokens -> [N, H], those of images in their places."""
