"""One engine with numbers: `python -m gpu_dry.run_values ASKED.json REPORT.json`.

On a pretended GPU, where Triton's kernels run in its interpreter, or, where the specification names
none, on the CPU host that this is. Writes down the tokens of every request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"


def pretended(asked: dict[str, Any]) -> Any:
    """The machine, entered; before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from gpu_dry.device import pretend
    from gpu_dry.graphs import Machine

    machine = Machine(values=True)
    pretend(asked["gpu"], machine)
    from gpu_dry import operators, tensors
    from gpu_dry.kernels import interpret_where_launched

    operators.stand_in(machine)
    tensors.enter(machine)
    interpret_where_launched(machine)
    return machine


OF_FAMILY: Final[dict[str, dict[str, Any]]] = {
    "diffusion_gemma": {"limit_mm_per_prompt": {"video": 0}},
    "sdar": {},
    # A step holds a whole request.
    "llada": {"max_model_len": 96, "diffusion_config": {"canvas_length": 8}},
}
SIZES: Final = {"diffusion_gemma": [8, 16, 24, 32], "sdar": [4, 8, 12, 16], "llada": [64]}
"""Rows that graphs are captured for: a capture runs the model."""


def options_of(asked: dict[str, Any]) -> dict[str, Any]:
    """Of the engine: roomy on the host; on a GPU prompts are cut and requests pushed out."""
    common = {
        "dtype": "float32",
        "max_model_len": 192,
        "max_num_seqs": 4,
        "disable_log_stats": True,
        **OF_FAMILY[asked["family"]],
    }
    if asked.get("gpu") is None:
        return common | {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    graphs = asked.get("graphs", "NONE")
    return (
        common
        | {
            "max_num_batched_tokens": 96,
            "kv_cache_memory_bytes": 4 << 20,
            "kernel_config": {
                "enable_flashinfer_autotune": False,
                "enable_jit_warmup": False,
                "moe_backend": "triton",
                "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
            },
            "compilation_config": {
                "mode": 0,
                "custom_ops": ["none"],
                "cudagraph_mode": graphs,
                "cudagraph_capture_sizes": SIZES[asked["family"]],
            },
        }
        | asked.get("options", {})
    )


def request(one: dict[str, Any]) -> tuple[Any, Any]:
    """Prompt and parameters for `LLM.generate`."""
    from PIL import Image
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(one["sampling"])
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    prompt: Any = {"prompt_token_ids": one["prompt"]}
    if one["image"]:
        picture = Image.linear_gradient("L").resize((96, 144)).convert("RGB")
        prompt = {"prompt": "<|image|> What is it?", "multi_modal_data": {"image": picture}}
    return prompt, SamplingParams(**fields)


def main() -> None:
    asked, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    machine = pretended(asked) if asked.get("gpu") else None

    from vllm import LLM
    from vllm.v1.core.sched.scheduler import Scheduler

    from gpu_dry.cases import ROUNDS

    pushed_out: list[int] = []
    original = Scheduler._preempt_request
    Scheduler._preempt_request = lambda *args, **rest: (
        pushed_out.append(1),
        original(*args, **rest),
    )[1]

    started = time.perf_counter()
    if machine is not None:
        from gpu_dry import plants

        plants.plant(asked.get("plant"))
    llm = LLM(asked["checkpoint"], **options_of(asked))
    up = time.perf_counter()
    report: dict[str, Any] = {"answers": {}, "rounds": [], "start seconds": round(up - started, 1)}
    if machine is not None:
        from gpu_dry.meter import ADMISSION, measured
        from vllm_diffusion.engine.model_state import CanvasModelState
        from vllm_diffusion.engine.sampler import CanvasSampler

        measured(machine.meter, CanvasSampler, "_advance", "denoising")
        measured(machine.meter, CanvasModelState, "add_request", ADMISSION)
        machine.meter.watching = True
    seen, waited = Counter[str](), Counter[str]()
    only = asked.get("only")  # names, for who looks for a mistake
    for round_ in ROUNDS[asked["cases"]]:
        cases = {name: one for name, one in round_.items() if only is None or name in only}
        if not cases:
            continue
        prompts, sampling = zip(*(request(one) for one in cases.values()), strict=True)
        answers = llm.generate(list(prompts), list(sampling), use_tqdm=False)
        if machine is not None:
            meter = machine.meter
            report["rounds"].append(
                {
                    "names": [*cases],
                    "steps": meter.calls["denoising"] - seen["denoising"],
                    "waits": dict(meter.waits - waited),
                }
            )
            seen, waited = Counter(meter.calls), Counter(meter.waits)
        for name, answer in zip(cases, answers, strict=True):
            said = answer.outputs[0]
            report["answers"][name] = {
                "tokens": list(said.token_ids),
                "cached": answer.num_cached_tokens,
                "logprobs": [
                    sorted((one.logprob for one in row.values()), reverse=True)
                    for row in said.logprobs or ()
                ],
            }
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["preemptions"] = len(pushed_out)
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    report["asynchronous"] = bool(scheduler.async_scheduling)
    if machine is not None:
        from gpu_dry.engines import chosen

        report |= chosen(llm)
        report["replays"] = machine.meter.replays["all"]
        report["waits"] = dict(machine.meter.waits)
        report["kernels"] = dict(machine.meter.operators.get("all", {}))
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
