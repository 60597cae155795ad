"""What a family says about LoRA adapters of its models.

It is asked in three places: where an adapter is checked and read (``peft``), where a request enters
(``admission``), and where a worker keeps adapters for its layers (``slots``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedMatrix:
    """A matrix that an adapter may change, and where it is in the served model."""

    inputs: int
    outputs: int
    path: str
    """Of the served layer, which may hold several matrices as one."""
    part: int = 0
    """Which of the layer's matrices it is."""
    parts: int = 1
    """How many the layer has."""
    also: tuple[int, ...] = ()
    """Parts of the same layer that are this matrix too, as values that are the keys."""
    experts: int = 0
    """Of a stack of experts, how many there are; 0 for a plain matrix."""
    conditions: bool = False
    """Whether it is of self-conditioning, which canvas rows alone pass, before all layers."""

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.inputs, self.outputs


class Located(NamedTuple):
    """What a module's name in the file of an adapter means."""

    kinds: tuple[str, ...]
    """Kinds of row that its factors are for."""
    tree: str
    """What stands before ``module`` in the names that PEFT's patterns are matched with."""
    module: str
    """A key of ``AdapterForm.matrices``, if the model has such a module."""


class AdapterForm(Protocol):
    """How a family's adapters are written, and for which rows they are. Needs no vLLM."""

    @property
    def row_kinds(self) -> tuple[str, ...]:
        """Kinds of row that an adapter may change differently: text rows first, canvas rows last.

        One kind where text and canvas rows share their factors.
        """

    def matrices(self, text_config: Any) -> Mapping[str, AdaptedMatrix]:
        """Every matrix that an adapter may change, by the module's name below its tree.

        Args:
            text_config: Transformers' configuration of the language model.
        """

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        """What is wrong with options of the family's own in ``adapter_config.json``."""

    def names(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], Located | None]:
        """What tells the meaning of a module's name; it gives None for one of no tree of ours.

        Args:
            folder: of the adapter.
            config: its ``adapter_config.json``.
        """

    def is_outside(self, module: str) -> bool:
        """Whether a module is not of the language model, but of a vision tower say."""

    def remark(self, name: str, coverage: Coverage) -> Remark | None:
        """What a user is told of an adapter that is served; None where all is as expected."""


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The served model, as far as an adapter has to fit it."""

    name: str
    """What the model is called in messages."""
    form: AdapterForm
    """How the family's adapters are written."""
    matrices: Mapping[str, AdaptedMatrix]
    """What the family's form says of this model."""
    max_rank: int
    """The largest rank that is served (``--max-lora-rank``)."""
    targets: frozenset[str] | None = None
    """Names of modules that may be adapted (``--lora-target-modules``); None is all."""
    fixed_experts: bool = False
    """Whether the experts cannot be adapted, as those of a quantised checkpoint."""

    @classmethod
    def of(cls, form: AdapterForm, text_config: Any, **others: Any) -> AdapterBase:
        """What an adapter has to fit, of a model with this configuration."""
        return cls(form=form, matrices=form.matrices(text_config), **others)

    def serves(self, module: str) -> bool:
        """Whether this module, named as in ``matrices``, may be adapted."""
        matrix = self.matrices[module]
        if self.fixed_experts and matrix.experts:
            return False
        if self.targets is None:
            return True
        # The whole path, vLLM's name or the file's, as for vLLM's own models.
        names = {matrix.path, matrix.path.rpartition(".")[2]}
        if not matrix.experts:
            names.add(module.rpartition(".")[2])
        return not self.targets.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which rows an adapter changes."""

    kinds: frozenset[str]
    """Kinds of row that have factors, of the family's."""
    shared: bool
    """Whether one module's factors are for several kinds of row."""
    made_for: str
    """The base model that the adapter names."""


class Remark(NamedTuple):
    """A line of the log."""

    level: int
    """Of ``logging``."""
    text: str
