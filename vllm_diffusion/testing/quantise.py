"""Quantise a checkpoint the way released ones are: `... quantise FROM TO`.

Takes a checkpoint folder with plain weights. Gives a folder with the same model in the layout that
llm-compressor saves: FP8-dynamic or NVFP4 (W4A4) of compressed-tensors, whose own code rounds and
packs every matrix, or in that of NVIDIA's Model Optimizer, which holds the same NVFP4 under other
names. The family says which matrices are quantised (`testing/quantisable.py` in its folder); the
linear layers that stay plain are listed under `ignore`.

Weights are rounded to nearest, without calibration. A row of FP8 has the scale of its largest
weight, a group of NVFP4 the one with the smallest squared error. NVFP4 asks for a scale of the
activations too: every matrix gets that of `ACTIVATION_PEAK`. On a CPU nothing reads it.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from vllm_diffusion.testing.families import part_of

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

Form = Literal["fp8-dynamic", "nvfp4", "modelopt-nvfp4"]

PRESETS: Final[Mapping[Form, tuple[str, str]]] = {
    "fp8-dynamic": ("FP8_DYNAMIC", "float-quantized"),
    "nvfp4": ("NVFP4", "nvfp4-pack-quantized"),
    "modelopt-nvfp4": ("NVFP4", "nvfp4-pack-quantized"),
}
"""Of each form the scheme and the layout, by the names that compressed-tensors gives them."""

SCALE_STEPS: Final = 16
"""Scales that are tried in an octave for a group; E4M3 has eight."""

ACTIVATION_PEAK: Final = 16.0
"""Largest activation that the scales of NVFP4's activations leave room for."""

WEIGHTS: Final = "model.safetensors"


def quantise_checkpoint(source: str | Path, target: str | Path, form: Form) -> Path:
    """Write a quantised copy of the checkpoint `source` into the folder `target`; return that.

    The copy's `config.json` says how it is quantised. Takes a second or two for a tiny checkpoint;
    one of several files is not read. Raises `ValueError` where a matrix does not fit the form.
    """
    from safetensors.torch import load_file, save_file

    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in {".json", ".jinja"}:
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family = part_of(config["model_type"], "quantisable")
    matrices, rest = family.split(load_file(source / WEIGHTS))
    packed = _compress(matrices, form, family.FUSED)
    if form == "modelopt-nvfp4":
        packed = dict(_renamed(name, tensor) for name, tensor in packed.items())
    weights = {**rest, **packed}
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    config["quantization_config"] = quantisation_config(form, ignore=family.plain_linears(rest))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def _compress(
    matrices: Mapping[str, "Tensor"], form: Form, fused: Sequence[set[str]]
) -> dict[str, "Tensor"]:
    """Every matrix as the tensors that compressed-tensors stores for it, by full name."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import generate_gparam

    preset, layout = PRESETS[form]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(layout)
    group = scheme.weights.group_size
    peaks = _shared_peaks(matrices, fused)
    stored: dict[str, Tensor] = {}
    for module, weight in matrices.items():
        if group and weight.shape[1] % group:
            raise ValueError(
                f"{module} has {weight.shape[1]} inputs, which are no groups of {group}: "
                f"{form} needs other sizes."
            )
        parts: dict[str, Tensor] = {"weight": weight.contiguous()}
        overall = generate_gparam(-peaks[module], peaks[module]) if group else None
        parts["weight_scale"] = _best_scales(weight, scheme.weights, overall)
        if overall is not None:
            peak = torch.tensor(ACTIVATION_PEAK)
            parts["weight_global_scale"] = overall
            parts["input_global_scale"] = generate_gparam(-peak, peak)
        for name, tensor in compressor.compress(parts, scheme).items():
            stored[f"{module}.{name}"] = tensor.contiguous()
    return stored


def _best_scales(weight: "Tensor", form: "QuantizationArgs", overall: "Tensor | None") -> "Tensor":
    """[N, K / group], the scales of `weight` [N, K], in its dtype and rounded as they are stored.

    In groups the scale that errs least by squares, of those from half to twice that of the largest
    weight; for whole rows that of the largest weight.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().reshape(len(weight), -1, form.group_size or weight.shape[1])
    low, high = groups.amin(-1), groups.amax(-1)
    steps = range(-SCALE_STEPS, SCALE_STEPS + 1) if form.group_size else [0]
    scales, errors = [], []
    for step in steps:
        factor = 2 ** (step / SCALE_STEPS)
        scale, zero = calculate_qparams(low * factor, high * factor, form, global_scale=overall)
        scale = scale.to(weight.dtype)
        rounded = fake_quantize(groups.flatten(1), scale, zero, form, global_scale=overall)
        errors.append((rounded.view_as(groups) - groups).square().sum(-1))
        scales.append(scale)
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best)[0]


def _shared_peaks(
    matrices: Mapping[str, "Tensor"], fused: Sequence[set[str]]
) -> dict[str, "Tensor"]:
    """Of every matrix the largest magnitude of all that an engine may fuse with it."""
    peaks = {}
    for module, weight in matrices.items():
        parent, _, name = module.rpartition(".")
        alike = next((names for names in fused if name in names), {name})
        others = [matrices[f"{parent}.{one}"] for one in alike if f"{parent}.{one}" in matrices]
        peaks[module] = max(one.abs().max().float() for one in (weight, *others))
    return peaks


def _renamed(name: str, tensor: "Tensor") -> tuple[str, "Tensor"]:
    """A tensor as Model Optimizer has it: whole tensors are multiplied with their scale."""
    module, _, part = name.rpartition(".")
    names = {
        "weight_packed": "weight",
        "weight_global_scale": "weight_scale_2",
        "input_global_scale": "input_scale",
    }
    inverse = part.endswith("global_scale")
    return f"{module}.{names.get(part, part)}", 1 / tensor[0] if inverse else tensor


def quantisation_config(form: Form, *, ignore: Sequence[str]) -> dict[str, Any]:
    """What `config.json` says about it."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    preset, layout = PRESETS[form]
    if form == "modelopt-nvfp4":
        return {
            "quant_method": "modelopt",
            "quant_algo": preset,
            "producer": {"name": "modelopt"},
            "group_size": 16,
            "ignore": list(ignore),
        }
    described: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=list(ignore),
        format=layout,
        quantization_status="compressed",
    ).model_dump(mode="json")
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the path and the sizes before and after."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_diffusion.testing.quantise",
        description="Quantise a tiny checkpoint as the released ones of its family are.",
    )
    parser.add_argument("source", type=Path, help="checkpoint with plain weights, in one file")
    parser.add_argument("target", type=Path, help="where to write the quantised one")
    parser.add_argument("--form", choices=get_args(Form), default="nvfp4")
    options = parser.parse_args(arguments)
    quantise_checkpoint(options.source, options.target, options.form)
    before, after = (folder / WEIGHTS for folder in (options.source, options.target))
    print(f"{options.target} ({before.stat().st_size} -> {after.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
