"""A LoRA adapter as PEFT saves it for Transformers' DiffusionGemma, checked and placed.

Takes a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Gives the low-rank
factors of every module of ours, once for text rows (Transformers' encoder) and once for canvas rows
(its decoder), or one `AdapterError` with every problem. `adapter_names` says which rows a name is
for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open

from vllm_diffusion.errors import AdapterError
from vllm_diffusion.models.diffusion_gemma.adapter_names import (
    BOTH,
    CANVAS,
    EXPERT_MATRICES,
    SHARED,
    TEXT,
    factors_by_module,
    is_of_images,
    located,
    placed_at,
    shares_stack,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

_EXPERTS: Final = re.compile(r"^(layers\.\d+\.experts)(\.base_layer)?$")

_SLICES: Final = {"qkv_proj": 3, "gate_up_proj": 2}

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
class AdapterBase:
    """The served model, as far as an adapter has to fit it."""

    name: str
    """What the model is called in messages."""
    shapes: Mapping[str, tuple[int, int]]
    """Inputs and outputs of every module that can be adapted, by its name below either tree."""
    experts: int
    """Experts a layer; the factors of all stand in one tensor."""
    max_rank: int
    """The largest rank that is served (``--max-lora-rank``)."""
    targets: frozenset[str] | None = None
    """Names of modules that may be adapted (``--lora-target-modules``); None is all."""
    fixed_experts: bool = False
    """Whether the experts cannot be adapted, as those of a quantised checkpoint."""

    def serves(self, module: str) -> bool:
        """Whether this module, named as in ``shapes``, may be adapted."""
        path, _ = placed_at(module)
        if self.fixed_experts and path.endswith(".experts"):
            return False
        if self.targets is None:
            return True
        # The whole path, vLLM's name or the file's, as for vLLM's own models.
        names = {path, path.rpartition(".")[2]}
        if not path.endswith(".experts"):
            names.add(module.rpartition(".")[2])
        return not self.targets.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class Factors:
    """W + b @ a: the low-rank change of one matrix. I inputs, O outputs, r rank, E experts."""

    a: Tensor  # [r, I], of experts [E, r, I]
    b: Tensor  # [O, r], of experts [E, O, r]; the scale is multiplied in


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a file changes, by path of the served module: its parts in order, None unchanged."""

    text: Mapping[str, tuple[Factors | None, ...]]
    canvas: Mapping[str, tuple[Factors | None, ...]]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which rows an adapter changes."""

    text: bool
    """Those of prompts and commits."""
    canvas: bool
    shared: bool
    """Whether factors of one stack of layers serve both, see `adapter_names`."""
    made_for: str
    """The base model that the adapter names."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Where the factors of one module stand in a file."""

    sides: tuple[str, ...]
    module: str  # a key of AdapterBase.shapes
    a: str
    b: str
    scale: float


def adaptable(text_config: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every matrix that an adapter may change.

    Args:
        text_config: Transformers' ``DiffusionGemmaTextConfig``.
    """
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    mlp = {
        "gate_proj": (hidden, text_config.intermediate_size),
        "up_proj": (hidden, text_config.intermediate_size),
        "down_proj": (text_config.intermediate_size, hidden),
    }
    shapes = {f"self_conditioning.{name}": shape for name, shape in mlp.items()}
    for index, kind in enumerate(text_config.layer_types):
        layer = text_config.per_layer_config[index]
        queries, keys = heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        own = {
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
            "self_attn.o_proj": (queries, hidden),
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
            "router.proj": (hidden, text_config.num_experts),
            "experts.gate_up_proj": (hidden, 2 * text_config.moe_intermediate_size),
            "experts.down_proj": (text_config.moe_intermediate_size, hidden),
        }
        if kind == "full_attention":
            del own["self_attn.v_proj"]  # its values are the keys
        shapes |= {f"layers.{index}.{name}": shape for name, shape in own.items()}
    return shapes


def check_adapter(folder: Path, base: AdapterBase) -> Coverage:
    """Raise `AdapterError` with everything that is wrong; reads names and shapes, few values."""
    config, pairs = _opened(folder, base)
    sides = {side for pair in pairs for side in pair.sides}
    return Coverage(
        text=TEXT in sides,
        canvas=CANVAS in sides,
        shared=any(pair.sides == BOTH for pair in pairs),
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
    sides: dict[str, dict[str, list[Factors | None]]] = {TEXT: {}, CANVAS: {}}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for pair in pairs:
            factors = _factors(pair, file, base.experts, dtype)
            path, index = placed_at(pair.module)
            last = path.rpartition(".")[2]
            parts = len(EXPERT_MATRICES) if last == "experts" else _SLICES.get(last, 1)
            keys_are_values = pair.module.endswith(".k_proj") and (
                pair.module.replace(".k_proj", ".v_proj") not in base.shapes
            )
            for side in pair.sides:
                slices = sides[side].setdefault(path, [None] * parts)
                slices[index] = factors
                if keys_are_values:
                    slices[2] = factors
    for paths in sides.values():
        for path, slices in paths.items():
            if path.endswith(".experts"):  # vLLM's layer takes both of its matrices or none
                names = [f"{path.removeprefix('model.')}.{name}" for name in EXPERT_MATRICES]
                slices[:] = [
                    factors or _no_change(base.shapes[name], base.experts, dtype)
                    for factors, name in zip(slices, names, strict=True)
                ]
    return Adapter(
        text={path: tuple(slices) for path, slices in sides[TEXT].items()},
        canvas={path: tuple(slices) for path, slices in sides[CANVAS].items()},
    )


def _no_change(shape: tuple[int, int], experts: int, dtype: torch.dtype) -> Factors:
    inputs, outputs = shape
    return Factors(
        a=torch.zeros(experts, 1, inputs, dtype=dtype),
        b=torch.zeros(experts, outputs, 1, dtype=dtype),
    )


def _factors(pair: _Pair, file: Any, experts: int, dtype: torch.dtype) -> Factors:
    a, b = file.get_tensor(pair.a), file.get_tensor(pair.b)
    if ".experts." in pair.module:
        # PEFT's layout of a parameter with three dimensions: a stacks the experts, b interleaves.
        a = a.unflatten(0, (experts, -1))
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return Factors(a=a.to(dtype).contiguous(), b=(b.float() * pair.scale).to(dtype).contiguous())


def _opened(folder: Path, base: AdapterBase) -> tuple[dict[str, Any], list[_Pair]]:
    """Configuration and modules of a checked adapter."""
    config, problems = _config(folder, base.max_rank)
    pairs: list[_Pair] = []
    if not (folder / WEIGHTS).is_file():
        problems.append(f"there is no {WEIGHTS}")
    else:
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                shared = shares_stack(folder, config)
                pairs, wrong = _pairs(file, config, base, shared=shared)
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


def _config(folder: Path, max_rank: int) -> tuple[dict[str, Any], list[str]]:
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
    if not isinstance(config.get(SHARED, False), bool):
        problems.append(f"{SHARED} must be true or false, got {config[SHARED]!r}")
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(_is_pattern(pattern) for pattern in patterns):
        problems.append("rank_pattern and alpha_pattern must map regular expressions to numbers")
        return {**config, "rank_pattern": None, "alpha_pattern": None}, problems
    ranks = [config.get("r"), *patterns[0].values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        problems.append(f"r must be a positive integer, got {ranks[0]!r}")
    elif max(ranks) > max_rank:
        problems.append(f"its rank {max(ranks)} is above {max_rank}, see --max-lora-rank")
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
    file: Any, config: Mapping[str, Any], base: AdapterBase, *, shared: bool
) -> tuple[list[_Pair], list[str]]:
    """The modules that a file of factors adapts, and what does not fit."""
    names, strange = factors_by_module(file.keys())
    pairs, unknown, closed, shapes, twice = [], [], [], [], []
    given: set[tuple[str, str]] = set()
    for full, found in names.items():
        if is_of_images(full):
            # Trained on text, these keep their start, which changes nothing.
            if "B" in found and bool(file.get_tensor(found["B"]).any()):
                closed.append(full)
            continue
        sides, module = located(full, shared=shared)
        if len(found) < 2:  # noqa: PLR2004 - A and B
            shapes.append(f"{full} lacks lora_{'AB'.replace(next(iter(found)), '')}")
            continue
        a, b = (tuple(file.get_slice(found[factor]).get_shape()) for factor in "AB")
        if (experts := _EXPERTS.match(module)) is not None:
            module = f"{experts[1]}.{_expert_matrix(a, b, base, experts[1])}"
        if not sides or module not in base.shapes:
            unknown.append(full)
        elif not base.serves(module):
            closed.append(full)
        else:
            rank, scale = _rank_and_scale(f"{_tree(full)}{module}", config)
            if wrong := _misfit(a, b, base, module, rank):
                shapes.append(f"{full} {wrong}")
            places = {(side, module) for side in sides}
            if places & given:
                twice.append(full)
            given |= places
            pairs.append(_Pair(sides, module, found["A"], found["B"], scale))
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


def _tree(full: str) -> str:
    return full.partition("layers.")[0] if "layers." in full else "model.decoder."


def _expert_matrix(a: Sequence[int], b: Sequence[int], base: AdapterBase, experts: str) -> str:
    """Which of a layer's two expert tensors factors belong to: PEFT's names do not always tell."""
    for name in EXPERT_MATRICES:
        if base.shapes.get(f"{experts}.{name}") == (a[-1], b[0]):
            return name
    return EXPERT_MATRICES[0]


def _misfit(
    a: Sequence[int], b: Sequence[int], base: AdapterBase, module: str, rank: int
) -> str | None:
    """How the shapes of factors differ from what the module and the rank ask for."""
    inputs, outputs = base.shapes[module]
    rows = rank * base.experts if ".experts." in module else rank
    expected = (rows, inputs), (outputs, rows)
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
