"""A LoRA adapter as PEFT saves it, checked and placed.

Takes a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Gives the low-rank
factors of every matrix of the served model, by kind of row, or one `AdapterError` with every
problem. The family's ``AdapterForm`` says what the names in the file mean.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from vllm_diffusion.engine.lora.form import AdapterBase, Coverage
from vllm_diffusion.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from vllm_diffusion.engine.lora.form import AdaptedMatrix, Located

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

_FACTOR: Final = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight$")

# Options of PEFT that make more of an adapter than two factors a module.
_EXTRAS: Final = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
# Initial values of the factors alone. Others, PiSSA say, change the base weights as well.
_PLAIN_STARTS: Final = {"gaussian", "eva", "orthogonal"}

_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Factors:
    """W + b @ a: the low-rank change of one matrix. I inputs, O outputs, r rank, E experts."""

    a: Tensor  # [r, I], of experts [E, r, I]
    b: Tensor  # [O, r], of experts [E, O, r]; the scale is multiplied in


Parts: TypeAlias = "tuple[Factors | None, ...]"
"""The factors of a layer's matrices in order, None unchanged."""

Adapter: TypeAlias = "Mapping[str, Mapping[str, Parts]]"
"""What an adapter changes, by kind of row and path of the served layer."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Where the factors of one module stand in a file."""

    kinds: tuple[str, ...]
    module: str  # a key of AdapterBase.matrices
    a: str
    b: str
    scale: float


def check_adapter(folder: Path, base: AdapterBase) -> Coverage:
    """Raise `AdapterError` with everything that is wrong; reads names and shapes, few values."""
    config, pairs = _opened(folder, base)
    return Coverage(
        kinds=frozenset(kind for pair in pairs for kind in pair.kinds),
        shared=any(len(pair.kinds) > 1 for pair in pairs),
        made_for=str(config.get("base_model_name_or_path")),
    )


def read_adapter(folder: Path, base: AdapterBase, dtype: torch.dtype) -> Adapter:
    """Check and read the adapter in a folder.

    Args:
        folder: as PEFT's ``save_pretrained`` writes it.
        base: the model it is for.
        dtype: of the factors.

    Raises:
        AdapterError: a file is missing, damaged or does not fit; the message has all problems.
    """
    _, pairs = _opened(folder, base)
    adapter: dict[str, dict[str, list[Factors | None]]] = {kind: {} for kind in base.form.row_kinds}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for pair in pairs:
            matrix = base.matrices[pair.module]
            factors = _factors(pair, file, matrix.experts, dtype)
            for kind in pair.kinds:
                parts = adapter[kind].setdefault(matrix.path, [None] * matrix.parts)
                for part in (matrix.part, *matrix.also):
                    parts[part] = factors
    # vLLM's layer of experts takes both of its matrices or none.
    for matrix in base.matrices.values():
        for paths in adapter.values():
            if matrix.experts and matrix.path in paths and paths[matrix.path][matrix.part] is None:
                paths[matrix.path][matrix.part] = _no_change(matrix, dtype)
    return {
        kind: {path: tuple(parts) for path, parts in paths.items()}
        for kind, paths in adapter.items()
    }


def _no_change(matrix: AdaptedMatrix, dtype: torch.dtype) -> Factors:
    return Factors(
        a=torch.zeros(matrix.experts, 1, matrix.inputs, dtype=dtype),
        b=torch.zeros(matrix.experts, matrix.outputs, 1, dtype=dtype),
    )


def _factors(pair: _Pair, file: Any, experts: int, dtype: torch.dtype) -> Factors:
    a, b = file.get_tensor(pair.a), file.get_tensor(pair.b)
    if experts:
        # PEFT's layout of a parameter with three dimensions: a stacks the experts, b interleaves.
        a = a.unflatten(0, (experts, -1))
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return Factors(a=a.to(dtype).contiguous(), b=(b.float() * pair.scale).to(dtype).contiguous())


def _opened(folder: Path, base: AdapterBase) -> tuple[dict[str, Any], list[_Pair]]:
    """Configuration and modules of a checked adapter."""
    config, problems = _config(folder, base)
    pairs: list[_Pair] = []
    if not (folder / WEIGHTS).is_file():
        problems.append(f"there is no {WEIGHTS}")
    else:
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                pairs, wrong = _pairs(file, config, base, base.form.names(folder, config))
                problems += wrong
        except SafetensorError as error:
            problems.append(f"{WEIGHTS} is damaged or incomplete ({error})")
    if not (problems or pairs):
        problems.append(f"{WEIGHTS} adapts nothing")
    if problems:
        raise AdapterError(
            f"the adapter in {folder} cannot be served on {base.name}: {'; '.join(problems)}."
        )
    return config, pairs


def _config(folder: Path, base: AdapterBase) -> tuple[dict[str, Any], list[str]]:
    """The adapter's configuration, and what of it is not served."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return {}, [f"there is no {CONFIG}"]
    except (OSError, ValueError) as error:
        return {}, [f"{CONFIG} cannot be read ({error})"]
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return {}, [f"{CONFIG} is not of a LoRA adapter (peft_type LORA)"]
    problems = [f"{name} is not served" for name in _EXTRAS if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append("bias is not served")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights={start!r} changes the base model's weights too")
    problems += base.form.problems(config)
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(_is_pattern(pattern) for pattern in patterns):
        problems.append("rank_pattern and alpha_pattern must map regular expressions to numbers")
        return {**config, "rank_pattern": None, "alpha_pattern": None}, problems
    ranks = [config.get("r"), *patterns[0].values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        problems.append(f"r must be a positive integer, got {ranks[0]!r}")
    elif max(ranks) > base.max_rank:
        problems.append(f"its rank {max(ranks)} is above {base.max_rank}, see --max-lora-rank")
    alphas = [config.get("lora_alpha"), *patterns[1].values()]
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        problems.append(f"lora_alpha must be a number, got {alphas[0]!r}")
    return config, problems


def _is_pattern(pattern: object) -> bool:
    if not isinstance(pattern, dict):
        return False
    try:
        return all(re.compile(key) for key in pattern)
    except re.error:
        return False


def _pairs(
    file: Any,
    config: Mapping[str, Any],
    base: AdapterBase,
    located: Callable[[str], Located | None],
) -> tuple[list[_Pair], list[str]]:
    """The modules that a file of factors adapts, and what does not fit."""
    names, strange = _factors_by_module(file.keys())
    pairs, unknown, closed, shapes, twice = [], [], [], [], []
    given: set[tuple[str, str]] = set()
    for full, found in names.items():
        if base.form.is_outside(full):
            # Trained on text, these keep their start, which changes nothing.
            if "B" in found and bool(file.get_tensor(found["B"]).any()):
                closed.append(full)
            continue
        if len(found) < 2:  # noqa: PLR2004 - A and B
            shapes.append(f"{full} lacks lora_{'AB'.replace(next(iter(found)), '')}")
            continue
        a, b = (tuple(file.get_slice(found[factor]).get_shape()) for factor in "AB")
        place = located(full)
        module = None if place is None else _matrix_of(place.module, a, b, base)
        if place is None or module is None:
            unknown.append(full)
        elif not base.serves(module):
            closed.append(full)
        else:
            rank, scale = _rank_and_scale(f"{place.tree}{module}", config)
            if wrong := _misfit(a, b, base.matrices[module], rank):
                shapes.append(f"{full} {wrong}")
            places = {(kind, module) for kind in place.kinds}
            if places & given:
                twice.append(full)
            given |= places
            pairs.append(_Pair(place.kinds, module, found["A"], found["B"], scale))
    made_for = config.get("base_model_name_or_path")
    problems = [
        f"{what}: {_some(which)}"
        for what, which in (
            ("not low-rank factors", strange),
            (f"modules the model does not have (the adapter is for {made_for!r})", unknown),
            ("modules that are served without adapters", closed),
            ("factors of another shape", shapes),
            ("factors given twice for the same rows", twice),
        )
        if which
    ]
    return pairs, problems


def _factors_by_module(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names of a file: by module and factor (A or B), and those that are of no factor."""
    modules: dict[str, dict[str, str]] = {}
    strange = []
    for name in sorted(names):
        match = _FACTOR.match(name)
        if match is None or match[2] in modules.get(match[1], {}):
            strange.append(name)
        else:
            modules.setdefault(match[1], {})[match[2]] = name
    return modules, strange


def _matrix_of(module: str, a: Sequence[int], b: Sequence[int], base: AdapterBase) -> str | None:
    """The matrix that factors of these shapes belong to; None where the model has no such module.

    Of a layer's experts PEFT wraps the tensors one in the other: its names do not always tell
    which of them is meant.
    """
    if module in base.matrices:
        return module
    layer = module.removesuffix(".base_layer")
    stacks = [
        name
        for name, matrix in base.matrices.items()
        if matrix.experts and name.rpartition(".")[0] == layer
    ]
    fitting = (name for name in stacks if base.matrices[name].shape == (a[-1], b[0]))
    return next(fitting, stacks[0] if stacks else None)


def _misfit(a: Sequence[int], b: Sequence[int], matrix: AdaptedMatrix, rank: int) -> str | None:
    """How the shapes of factors differ from what the matrix and the rank ask for."""
    rows = rank * (matrix.experts or 1)
    expected = (rows, matrix.inputs), (matrix.outputs, rows)
    if (tuple(a), tuple(b)) == expected:
        return None
    return f"is {list(a)} and {list(b)}, expected {list(expected[0])} and {list(expected[1])}"


def _rank_and_scale(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of a module: PEFT's patterns match the end of its name; the first one wins."""

    def own(option: str, default: Any) -> Any:
        for pattern, value in (config.get(option) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    rank = own("rank_pattern", config.get("r"))
    alpha = own("alpha_pattern", config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        return 1, 0.0  # reported with the configuration
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
