"""Memory of full batches at the real vocabulary, of our engine and native vLLM, in one run.

    python benchmarks/memory.py [--json FILE] [--ours N ...] [--native N ...] [--canvas N]

A random checkpoint of 262144 ids and a small hidden size, so that nearly all that a batch takes is
what its head takes. Every cell is an engine in a process of its own, which answers as many
requests at once as the cell says, a canvas of two steps each. Engine memory is what the process
held at its highest, from start to last answer, less what it held with vLLM imported and no engine:
weights, a KV cache of 1 GB, what profiling at start took, and the batch. Native runs on our CPU
stand-ins for its Triton kernels; its model, sampler and head are its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import _report
from _cell import measure
from _native_host import use_stand_ins
from _resident import resident

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, make_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 262144
PROMPT = list(range(300, 310))


def main() -> None:
    """Run every cell and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--ours", type=int, nargs="*", default=[8, 64], help="requests at once")
    arguments.add_argument("--native", type=int, nargs="*", default=[8], help="requests at once")
    arguments.add_argument("--canvas", type=int, default=256)
    arguments.add_argument("--cell", nargs=3, help="internal: run one here")
    options = arguments.parse_args()
    if options.quick:
        options.ours, options.native, options.canvas = [2, 8], [2], 32
    if options.cell:
        engine, checkpoint, requests = options.cell
        print(json.dumps(run_cell(engine, checkpoint, int(requests))))
        return
    table, flat = [], {}
    with tempfile.TemporaryDirectory() as folder:
        spec = TinySpec(vocab=VOCAB, canvas=options.canvas, max_steps=2, sliding_window=1024)
        checkpoint = str(make_tiny_checkpoint(folder, spec))
        for engine in ("ours", "native"):
            for requests in getattr(options, engine):
                cell = measure(
                    __file__,
                    *("--cell", engine, checkpoint, str(requests)),
                    environment=environment_of(engine),
                    name=f"{engine} with {requests} requests",
                )
                rows = requests * options.canvas
                table.append({"engine": engine, "requests": requests, "rows": rows, **cell})
                flat.update({f"{engine}.{requests}.{key}": value for key, value in cell.items()})
    _report.print_table(table)
    _report.finish(
        flat,
        "; ".join(
            f"{row['engine']}: {row['requests']} requests in {row['engine MB']:.0f} MB"
            for row in table
        ),
        options.json,
    )


def environment_of(engine: str) -> dict[str, str]:
    """What the process of an engine finds in its environment."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # In this process, so that memory is counted where it is taken.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **({} if engine == "ours" else {"VLLM_DIFFUSION": "0", "VLLM_USE_V2_MODEL_RUNNER": "1"}),
    }


def run_cell(engine: str, checkpoint: str, requests: int) -> dict[str, _report.Value]:
    """Memory and time of one full batch here."""
    if engine == "native":
        use_stand_ins()
    import vllm.v1.worker.cpu_worker  # noqa: F401 - so that the engine's own memory is what is left

    before = resident("VmRSS", forget_peak=True)
    generate = make_engine(checkpoint, requests)
    started = resident("VmHWM")
    start = time.perf_counter()
    generate()
    return {
        "engine MB": (resident("VmHWM") - before) / 1024,
        "at start MB": (started - before) / 1024,
        "seconds": time.perf_counter() - start,
    }


def make_engine(checkpoint: str, requests: int) -> Callable[[], None]:
    """An engine that answers as many requests at once, a canvas each."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        checkpoint,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=requests,
        max_num_batched_tokens=max(2048, 2 * requests * 256),
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)

    def generate() -> None:
        prompts = [TokensPrompt(prompt_token_ids=[*PROMPT, 300 + each]) for each in range(requests)]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        if any(len(output.outputs[0].token_ids) != 1 for output in outputs):
            sys.exit("an answer is missing")

    return generate


if __name__ == "__main__":
    main()
