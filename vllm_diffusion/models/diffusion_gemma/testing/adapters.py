"""LoRA adapters for a tiny checkpoint, in the layout that PEFT 0.21 saves, and what they change.

Takes a checkpoint folder. Gives a folder with ``adapter_config.json`` and
``adapter_model.safetensors``, the change of every weight, or a checkpoint with the change merged
in. Written by hand, so that no test needs PEFT: names, shapes and the order of the experts' factors
are those of ``get_peft_model(model, LoraConfig(target_modules=..., target_parameters=[
"experts.gate_up_proj", "experts.down_proj"])).save_pretrained(...)``.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_diffusion.testing.keyed_noise import keyed_noise

if TYPE_CHECKING:
    import torch

ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
"""Where Transformers holds the two trees of modules that share their weights."""

ONE_STACK = "model."
"""Where NeMo AutoModel holds the one stack of layers that stands for both."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "proj")
"""Last names of the linear modules; `proj` is the router's."""

EXPERTS = ("gate_up_proj", "down_proj")
"""The two tensors of a layer's experts: PEFT nests their factors, the first one innermost."""


def write_adapter(
    path: str | Path,
    checkpoint: str | Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: int = 8,
    trees: Sequence[str] = (ENCODER, DECODER),
    alike: bool = True,
    only: Sequence[str] = (),
    size: float = 0.3,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write random factors into `path`, made if missing, and return it.

    Args:
        path: folder.
        checkpoint: the model they are for, whose file says which modules there are.
        seed: of the factors.
        rank: of every module.
        alpha: PEFT's; factors are scaled by alpha / rank.
        trees: `ENCODER`, `DECODER` or both, or `ONE_STACK`.
        alike: give both trees the same factors.
        only: parts of names, of which a module must have one; empty takes all modules.
        size: of the change, against the weights of an initialised matrix.
        options: more of `adapter_config.json`.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(Path(checkpoint, "model.safetensors"), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        below = _adaptable(name)
        if below is None or (only and not any(part in below for part in only)):
            continue
        for tree in trees:
            if tree == ENCODER and below.startswith("self_conditioning."):
                continue
            key = f"{seed}:{below}" if alike else f"{seed}:{tree}:{below}"
            a, b = _factors(key, shape, rank, size * rank / alpha)
            module = f"base_model.model.{tree}{_peft_name(below, only)}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(checkpoint),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(options or {}), indent=2))
    return folder


def changes(adapter: str | Path, tree: str, experts: int) -> "dict[str, torch.Tensor]":
    """What an adapter adds to every weight of one tree, by the weight's name below it, in fp32.

    Args:
        adapter: folder, of one rank and alpha for all modules.
        tree: one of those that `write_adapter` was given.
        experts: experts a layer.
    """
    import torch
    from safetensors.torch import load_file

    folder = Path(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    factors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in factors.items():
        module = name.removeprefix(f"base_model.model.{tree}")
        if module == name or not name.endswith(".lora_A.weight"):
            continue
        if tree == ONE_STACK and module.startswith(("encoder.", "decoder.")):
            continue
        module = module.removesuffix(".lora_A.weight")
        b = factors[name.replace("lora_A", "lora_B")]
        if ".experts" not in module:
            found[f"{module}.weight"] = scale * b.float() @ a.float()
            continue
        stacked = a.float().reshape(experts, -1, a.shape[1])
        mixed = b.float().reshape(b.shape[0], -1, experts)
        change = scale * torch.einsum("ore,eri->eoi", mixed, stacked)
        nested = module.endswith(".base_layer")
        layer = module.removesuffix(".base_layer")
        found[f"{layer}.{EXPERTS[0] if nested else EXPERTS[1]}"] = change
    return found


def merge_adapter(checkpoint: str | Path, adapter: str | Path, path: str | Path) -> Path:
    """Write the checkpoint with the decoder's changes added to its weights into `path`."""
    from safetensors.torch import load_file, save_file

    folder = Path(path)
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    weights = load_file(file)
    experts = json.loads((folder / "config.json").read_text())["text_config"]["num_experts"]
    for name, change in changes(adapter, DECODER, experts).items():
        weights[DECODER + name] += change.to(weights[DECODER + name].dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _adaptable(name: str) -> str | None:
    """Name below its tree of the module, or tensor of experts, that a weight belongs to."""
    if not name.startswith(DECODER):
        return None
    below = name.removeprefix(DECODER)
    if ".experts." in below:
        return below
    module = below.removesuffix(".weight")
    return module if module != below and module.rpartition(".")[2] in LINEARS else None


def _peft_name(below: str, only: Sequence[str]) -> str:
    """The module PEFT wraps: a tensor of experts stands for the layer's experts, maybe nested."""
    experts, _, name = below.rpartition(".")
    if not experts.endswith(".experts"):
        return below
    both = not only or all(any(part in f"{experts}.{each}" for part in only) for each in EXPERTS)
    return f"{experts}.base_layer" if both and name == EXPERTS[0] else experts


def _factors(
    key: str, shape: Sequence[int], rank: int, size: float
) -> "tuple[torch.Tensor, torch.Tensor]":
    """A and B of a weight [out, in], or of experts [E, out, in] in PEFT's layout."""
    *experts, outputs, inputs = shape
    rows = rank * (experts[0] if experts else 1)
    a, b = keyed_noise(key, (rows, inputs), (outputs, rows))
    return a / inputs**0.5, b * size / rank**0.5
