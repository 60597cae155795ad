"""One GPU, shapes alone: `python -m gpu_dry.run_shapes SPEC.json REPORT.json`.

Starts an engine for each run that the specification asks for and writes down what it chose, what
its steps launched and waited for at every number of canvases, and what its kernels became.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_dry import engines, plants
from gpu_dry.device import pretend
from gpu_dry.graphs import Machine
from gpu_dry.kernels import Kernels, compile_where_launched
from gpu_dry.meter import measured

engines.prepare_environment()
REGIONS = ("all", "forward", "prepare_attn", "prepare_inputs", "sampler", "head")


def watch(machine: Machine, *, native: bool) -> None:
    """Name the regions of a step."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    measured(machine.meter, ModelCudaGraphManager, "run_fullgraph", "forward")
    measured(machine.meter, GPUModelRunner, "execute_model", "execute")
    if native:
        from vllm.model_executor.models import diffusion_gemma as native_model

        state = native_model.DiffusionGemmaModelState
        sampler = native_model.DiffusionSampler
        models = [native_model.DiffusionGemmaForConditionalGeneration]
    else:
        from vllm_diffusion.engine import model_state
        from vllm_diffusion.engine import sampler as ours
        from vllm_diffusion.head.reference import ReferenceHead
        from vllm_diffusion.head.stream import StreamingHead
        from vllm_diffusion.models.decoder.model import CanvasDecoder
        from vllm_diffusion.models.diffusion_gemma import model as our_model

        state, sampler = model_state.CanvasModelState, ours.CanvasSampler
        models = [our_model.DiffusionGemmaForBlockDiffusion, CanvasDecoder]
        for head in (StreamingHead, ReferenceHead):
            measured(machine.meter, head, "__call__", "head")
    for model in models:
        measured(machine.meter, model, "forward", "forward")
    measured(machine.meter, state, "prepare_attn", "prepare_attn")
    measured(machine.meter, state, "prepare_inputs", "prepare_inputs")
    measured(machine.meter, sampler, "__call__", "sampler")


class Steps:
    """Counts the steps that a number of running canvases takes."""

    def __init__(self, machine: Machine, llm: Any, *, native: bool, tokens: int) -> None:
        self.machine, self.engine, self.native = machine, llm.llm_engine, native
        self.added, self.tokens = 0, tokens

    def add(self, prompt: Any = None, *, most_steps: int = 1024) -> None:
        """One more request; with as many steps no canvas comes to its last one here."""
        from vllm import SamplingParams

        sampling: dict[str, Any] = {}
        if not self.native:
            sampling = {"seed": self.added, "extra_args": {"diffusion_max_steps": most_steps}}
        name, self.added = str(self.added), self.added + 1
        prompt = prompt or {"prompt_token_ids": list(range(30, 330))}
        self.engine.add_request(name, prompt, SamplingParams(max_tokens=self.tokens, **sampling))

    def run(self, steps: int) -> dict[str, Any]:
        """What some steps cost, all together; the first ones may bring prompts in."""
        meter = self.machine.meter
        meter.clear()
        meter.watching = True
        for _ in range(steps):
            self.engine.step()
        meter.watching = False
        return {
            "steps": steps,
            "launches": {name: meter.launches[name] for name in REGIONS},
            "kernels": {name: meter.kernels[name] for name in REGIONS},
            "waits": dict(meter.waits),
            "forwards_replayed": meter.replays["forward"],
            "operators": {
                name: dict(meter.operators.get(name, {})) for name in REGIONS if name != "forward"
            },
        }


def image() -> Any:
    from PIL import Image

    return Image.new("RGB", (96, 96), (200, 30, 30))


def one_run(machine: Machine, asked: dict[str, Any], folder: Path) -> Any:
    """Everything about one engine."""
    started = time.perf_counter()
    native, form, most = asked.get("native", False), asked.get("form"), asked["canvases"]
    llm = engines.start(
        machine,
        engines.released(folder / asked["family"] / str(form), asked["family"], form),
        images=asked["images"],
        max_model_len=engines.LONGEST[asked["family"]],
        max_num_batched_tokens=8192,
        max_num_seqs=most,
        kv_cache_memory_bytes=8 << 30,
        **asked.get("options", {}),
    )
    report: dict[str, Any] = engines.chosen(llm)
    report["start seconds"] = round(time.perf_counter() - started, 1)
    steps = Steps(machine, llm, native=native, tokens=asked.get("tokens", 4096))
    if asked["images"]:
        steps.add({"prompt": "<|image|> What is it?", "multi_modal_data": {"image": image()}})
    else:
        steps.add()
        report["prompt"] = steps.run(1)
    report["canvases"] = {}
    for count in asked.get("at", range(1, most + 1)):
        while steps.added < count:
            steps.add()
        # Asynchronous scheduling runs a step behind; prompts take one.
        steps.run(3)
        report["canvases"][count] = steps.run(2)
    if asked.get("fused"):
        # The last one again, now with a canvas that is committed beside the next one.
        steps.engine.abort_request([str(steps.added - 1)])
        steps.add(most_steps=6)
        one_by_one = [steps.run(1) for _ in range(10)]
        report["fused"] = [step for step in one_by_one if not step["forwards_replayed"]]
    report["seconds"] = round(time.perf_counter() - started, 1)
    engines.stop(llm)
    return report


def main() -> None:
    asked, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    machine, kernels = Machine(values=False), Kernels()
    gpu = pretend(asked["gpu"], machine)

    from gpu_dry import operators, tensors

    left_out = operators.stand_in(machine)
    tensors.enter(machine)
    compile_where_launched(machine, kernels)
    plants.plant(asked.get("plant"))
    watch(machine, native=asked.get("native", False))
    report: dict[str, Any] = {"gpu": gpu.name, "shared": gpu.shared, "runs": {}}
    for name, run in asked["runs"].items():
        left_out.clear()
        native = {"native": asked.get("native", False)}
        try:
            report["runs"][name] = one_run(machine, run | native, Path(out).parent)
        except Exception:  # noqa: BLE001 -- the test shows it
            report["runs"][name] = {"error": traceback.format_exc()[-3000:]}
        report["runs"][name]["left out"] = dict.fromkeys(left_out, 1)
        report["kernels"], report["failed"] = kernels.report(), kernels.failed
        engines.say(out, report)  # after every run: the next one may take the process with it


if __name__ == "__main__":
    main()
