"""Triton kernels: compiled where there are shapes alone, interpreted where there are values."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gpu_dry.tensors import DeviceTensor, unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_dry.graphs import Machine

IN_PLACE: dict[str, Callable[..., Any]] = {}
"""Kernels of vLLM that would take minutes in the interpreter: the same in torch, by name."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as the assembler made it for one target."""

    name: str
    ours: bool
    target: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    warps: int


class Kernels:
    """Every kernel that was launched, once a form."""

    def __init__(self) -> None:
        self.compiled: dict[str, tuple[str, bool, Any]] = {}
        self.failed: dict[str, str] = {}

    def keep(self, kernel: Any, compiled: Any) -> None:
        ours = "vllm_diffusion" in Path(kernel.fn.__code__.co_filename).parts
        self.compiled.setdefault(compiled.hash, (kernel.fn.__name__, ours, compiled))

    def report(self) -> list[dict[str, Any]]:
        """Ours alone is asked of the assembler once more, for its registers."""
        return [asdict(assembled(*one)) for one in self.compiled.values()]


def assembled(name: str, ours: bool, compiled: Any) -> Compiled:
    """What Triton's own assembler says about a compiled kernel."""
    import triton

    text = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", text)[1]
    found = Path(triton.__file__).parent.rglob("ptxas*")
    tools = {("blackwell" in tool.name): tool for tool in found if tool.is_file()}
    new = int(re.search(r"\d+", target)[0]) >= 100
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        said = subprocess.run(
            [tools.get(new) or tools[False], "-v", f"-arch={target}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return Compiled(
        name=name,
        ours=ours,
        target=target,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def compile_where_launched(machine: Machine, kernels: Kernels) -> None:
    """Launches compile for the pretended device, or find what they did before, and run nothing."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        machine.launch(f"triton:{self.fn.__name__}")
        try:
            with _disable_current_modes():
                compiled = original(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # noqa: BLE001 -- reported with its kernel
            kernels.failed[self.fn.__name__] = repr(error)[:400]
            return None
        if compiled is not None:
            kernels.keep(self, compiled)
        return compiled

    JITFunction.run = run


def interpret_where_launched(machine: Machine) -> None:
    """Launches run in Triton's interpreter, on what device tensors wrap."""
    from triton.runtime import interpreter

    original = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        name = getattr(self.fn, "__name__", "?")
        args, options = pytree.tree_map_only(DeviceTensor, unwrapped, (args, options))
        run = IN_PLACE.get(name, original)
        machine.launch(f"triton:{name}", 1, lambda: run(self, *args, **options))
        with _disable_current_modes():
            return run(self, *args, **options)

    interpreter.GridExecutor.__call__ = call
