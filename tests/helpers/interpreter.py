"""Triton without a GPU: its interpreter, which is chosen before import, and its assembler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


def interpreted(program: str, *arguments: str) -> str:
    """The last line that a file prints; skips where Triton has no interpreter."""
    pytest.importorskip("triton.runtime.interpreter", reason="Triton has no interpreter")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, program, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def compiled_for(
    capability: int,
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    *,
    other: str,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a kernel becomes for a GPU that need not be there, "ptx" and "cubin" among it.

    Args:
        capability: 90 for sm_90.
        kernel: a Triton function.
        kinds: types of arguments by name, as Triton writes them.
        constants: arguments that are known at compile time.
        other: the type of all other arguments.
        options: such as ``num_warps``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, other)
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options or {})
    return dict(compiled.asm)


def spilled(ptx: str) -> int:
    """Bytes a thread that a compiled kernel keeps in memory for want of registers."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target sm_((\d+)\w*)", ptx)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = get_ptxas(int(target[2])).path
        told = subprocess.run(
            [assembler, "-v", f"-arch=sm_{target[1]}", "-o", os.devnull, file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    found = re.search(r"(\d+) bytes spill stores", told)
    assert found is not None, told
    return int(found[1])
