"""Dynamo over the layers: `python -m gpu_dry.run_trace ASKED.json REPORT.json`.

Traces the part of the model that vLLM compiles, our layers at the released sizes, with nothing
allowed to fall out of the graph, on tensors that say `cuda`; the number of rows stays a symbol.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def model_of(config: Any) -> Any:
    """The model on meta tensors, in a process group of one."""
    import torch
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model

    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = initialize_model(vllm_config=config)
    torch.set_default_dtype(torch.float32)
    return model


def fake(root: Any, mode: Any) -> None:
    """Parameters, buffers and tensors in attributes become fake tensors on `cuda`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    memo: dict[int, Any] = {}

    def made(tensor: Any) -> Any:
        if id(tensor) not in memo:
            memo[id(tensor)] = FakeTensor(mode, tensor.detach(), torch.device("cuda:0"))
            memo[id(tensor)]._is_param = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)]._kept = tensor
        return memo[id(tensor)]

    for module in root.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: made(x) for name, x in store.items() if x is not None})
        for name, x in list(vars(module).items()):
            if isinstance(x, torch.Tensor):
                vars(module)[name] = made(x)


def main() -> None:
    asked, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from gpu_dry.device import pretend
    from gpu_dry.graphs import Machine

    machine = Machine(values=False)
    pretend(asked["gpu"], machine)
    import torch

    torch._C._ensureCUDADeviceGuardSet()
    from gpu_dry import engines, operators

    operators.stand_in(machine)
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context

    rows, hidden = 8192, engines.RELEASED.hidden
    config = EngineArgs(
        model=str(engines.released(out.parent / "released", "diffusion_gemma")),
        load_format="dummy",
        max_model_len=rows,
        max_num_batched_tokens=rows,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 0, "video": 0},
        kernel_config={"moe_backend": "triton"},
    ).create_engine_config()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with set_current_vllm_config(config):
        inner = model_of(config).model
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fake(inner, mode)
        started = time.perf_counter()
        with mode, set_forward_context(None, config, num_tokens=rows):
            embeds = torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda:0")
            positions = torch.zeros(rows, dtype=torch.int64, device="cuda:0")
            torch._dynamo.mark_dynamic(embeds, 0)
            torch._dynamo.mark_dynamic(positions, 0)
            forward = type(inner).forward.__get__(inner)
            answer = torch.compile(
                lambda p, e: forward(None, p, None, e), fullgraph=True, backend=keep
            )(positions, embeds)
    [graph] = graphs
    symbolic = [
        str(node.meta["example_value"].shape[0])
        for node in graph.graph.nodes
        if node.op == "placeholder"
        and isinstance(node.meta.get("example_value"), torch.Tensor)
        and any(isinstance(size, torch.SymInt) for size in node.meta["example_value"].shape)
    ]
    report = {
        "layers": len(inner.layers),
        "class": type(inner.layers[0]).__module__,
        "nodes": len(graph.graph.nodes),
        "answer": [str(answer.shape[0]), answer.shape[1], str(answer.dtype)],
        "symbolic inputs": symbolic,
        "attentions": sum("unified_attention" in str(n.target) for n in graph.graph.nodes),
        "seconds": round(time.perf_counter() - started, 1),
    }
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
