"""The row pass in CUDA: compiled by nvcc, run in an emulated block of threads, and on a GPU.

``emulation/cuda_runtime.h`` is the block: the very source that nvcc compiles, compiled for the CPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.heads import Case, assert_no_worse, assert_same_shape, assert_same_tokens, make_case

from vllm_diffusion.head import cuda, kinds, native, tile
from vllm_diffusion.head.sample import TILE
from vllm_diffusion.head.tile import RunningStats

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterator

    from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "head" / "row_pass.cu"
MASKED = -3e30
LOW_PRECISION = [torch.bfloat16, torch.float16]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@dataclass(frozen=True, slots=True)
class Library:
    """A built library; `device` says where its pointers point to."""

    device: str
    compiled: ctypes.CDLL


def run(*command: str | Path, timeout: int = 120) -> str:
    """What the command says; it must succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def emulate(folder: Path, source: Path = SOURCE) -> Library:
    """Compile a kernel for the CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    options = "-x c++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE"
    warnings = "-Wall -Wextra -Werror -Wno-unknown-pragmas"  # nvcc's pragmas
    includes = [f"-I{Path(__file__).parent / 'emulation'}", f"-I{SOURCE.parent}"]
    built = folder / "_row_pass_cuda.so"
    run("c++", *options.split(), *warnings.split(), *includes, source, "-o", built)
    return Library("cpu", cuda.load(folder))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return emulate(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(
    scope="session",
    params=["emulation", pytest.param("gpu", marks=[pytest.mark.gpu, needs_nvcc])],
)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    if request.param == "emulation":
        return request.getfixturevalue("emulation")
    folder = tmp_path_factory.mktemp("cuda")
    options = ["-O3", "-std=c++17", "-arch=native", "-Xcompiler", "-fPIC", "--shared"]
    run("nvcc", *options, SOURCE, "-o", folder / "_row_pass_cuda.so")
    return Library("cuda", cuda.load(folder))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Library], None]:
    """`install(library)`: what `cuda.absorb` calls."""

    def put(library: Library) -> None:
        monkeypatch.setattr(cuda, "library", lambda: library.compiled)
        if library.device == "cpu":
            library.compiled.emulate_order(0)
            monkeypatch.setattr(cuda, "_stream", lambda _: 0)

    return put


@pytest.fixture
def streams(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[Library], None], emulation: Library
) -> Iterator[list[int]]:
    """Every tile of a streaming head goes through the kernel; widths of those that did."""
    install(emulation)
    widths: list[int] = []

    def absorb(running: RunningStats, logits: Tensor, **how: object) -> tuple[Tensor, Tensor]:
        widths.append(logits.shape[1])
        return cuda.absorb(running, logits, **how)

    monkeypatch.setattr(native, "absorb", absorb)
    monkeypatch.setattr(native, "fits", lambda _: True)
    yield widths
    assert widths, "another form ran"


# ---- a streaming head, against the definition in fp64 ----


def check(case: Case, truth: object = None) -> None:
    plain = case.reference()(case.rows())
    truth = truth or case.truth()
    ours = case.streaming()(case.rows())
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


@for_each(vocab=[1, 63, 700, 2 * TILE + 17], softcap=[30.0, 2.0, None])
@pytest.mark.usefixtures("streams")
def test_it_is_the_definition(vocab: int, softcap: float | None) -> None:
    case = make_case(1, vocab=vocab, hidden=16, softcap=softcap)
    check(replace(case, hidden=case.hidden * min(1.0, (softcap or 30.0) / 30.0)))


@for_each(seed=range(3))
@pytest.mark.usefixtures("streams")
def test_masked_logits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "LISTED_AT_MOST", 0)
    case = make_case(seed, rewrite=True)
    assert case.rewrite is not None
    check(replace(case, rewrite=replace(case.rewrite, truncation=None, pinned=None)))


@for_each(temperature=[4e-3, 0.4, 1e3])
@pytest.mark.usefixtures("streams")
def test_any_temperature_is_safe(temperature: float) -> None:
    case = make_case(3)
    check(replace(case, temperature=torch.full_like(case.temperature, temperature)))


@for_each(dtype=LOW_PRECISION, seed=[2, 3])
@pytest.mark.usefixtures("streams")
def test_logits_and_weights_of_low_precision(dtype: torch.dtype, seed: int) -> None:
    case = make_case(seed, vocab=TILE + 77, dtype=dtype)
    # The same products, rounded alike: in fp64 from there on.
    exact = case.reference()
    logits, embedding = exact.logits(case.hidden).double(), case.embedding.double()
    truth = replace(
        exact,
        logits=lambda _: logits,
        soft_embedding=lambda prob: prob @ embedding * 5.65,
    )(case.rows())
    check(case, truth)


@for_each(softcap=[30.0, None])
@pytest.mark.usefixtures("streams")
def test_rows_of_nan_end_nothing(softcap: float | None) -> None:
    case = make_case(0, vocab=100, softcap=softcap)
    hidden = case.hidden.clone()
    hidden[3] = torch.nan
    ours = case.streaming()(case.rows(hidden=hidden))
    assert 0 <= int(ours.sample[3]) < 100
    assert 0 <= int(ours.argmax[3]) < 100
    assert ours.entropy[3].isnan()
    assert ours.top_prob[3].isnan()
    others = torch.arange(len(hidden)) != 3
    assert torch.equal(ours.sample[others], case.truth().sample[others])


# ---- one tile, against the torch form; on a GPU too ----

Absorb = partial[tuple["Tensor", "Tensor"]]


def one_tile(
    device: str, width: int, dtype: torch.dtype, *, spare: int, rows: int = 6, known: bool = True
) -> tuple[RunningStats, Tensor, Absorb, Absorb]:
    """What is running, a buffer [rows, width + spare], and both forms on its last columns."""
    generator = torch.Generator().manual_seed(width)
    buffer = (torch.randn(rows, width + spare, generator=generator) * 4).to(dtype).to(device)
    running = RunningStats.initial(rows, torch.device(device))
    if known:  # some rows have had a better tile, some a worse one
        running.top = torch.linspace(-20, 20, rows, device=device)
        running.second = running.top - 1
        running.mass, running.moment = running.mass + 3, running.moment - 2
        running.score = running.top / 4
        running.argmax, running.sample = running.argmax + 7, running.sample + 9
    uniforms = torch.rand(rows, 3, generator=generator).to(device)
    how = {
        "first": 40960,
        "softcap": 30.0,
        "temperature": torch.linspace(0.3, 1.2, rows, device=device),
        "uniforms": (uniforms[:, 0], uniforms[:, 2]),
    }
    return running, buffer, partial(cuda.absorb, **how), partial(tile.absorb, **how)


def of(running: RunningStats) -> dict[str, Tensor]:
    return {field.name: getattr(running, field.name) for field in fields(running)}


def copied(running: RunningStats) -> RunningStats:
    return RunningStats(**{name: value.clone() for name, value in of(running).items()})


def assert_same_statistics(ours: RunningStats, theirs: RunningStats) -> None:
    for name, value in of(ours).items():
        right = getattr(theirs, name)
        torch.testing.assert_close(value, right, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: n + m)


@for_each(
    width=[1, 7, 256, 2049, TILE - 1, TILE], spare=[0, 1, 8], dtype=[torch.float32, *LOW_PRECISION]
)
def test_a_tile_of_any_width_at_any_place(
    library: Library,
    install: Callable[[Library], None],
    width: int,
    spare: int,
    dtype: torch.dtype,
) -> None:
    install(library)
    running, buffer, absorb, plain = one_tile(library.device, width, dtype, spare=spare)
    theirs, before = copied(running), buffer.clone()
    weight, shrink = absorb(running, buffer[:, spare:])
    right, right_shrink = plain(theirs, before[:, spare:].float())
    assert_same_statistics(running, theirs)
    torch.testing.assert_close(shrink, right_shrink, rtol=2e-5, atol=2e-5)
    close = {} if dtype != torch.float32 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(weight, right.to(dtype), **close)
    assert torch.equal(buffer[:, :spare], before[:, :spare]), "columns beside the tile changed"


@for_each(width=[40, TILE], known=[False, True])
def test_tiles_that_may_say_nothing_or_one_id(
    library: Library, install: Callable[[Library], None], width: int, known: bool
) -> None:
    install(library)
    running, buffer, absorb, plain = one_tile(
        library.device, width, torch.float32, spare=0, known=known
    )
    buffer[:] = MASKED
    buffer[3, 30], buffer[4, 0], buffer[5, width - 1] = 1.0, -2.0, 100.0
    theirs, logits = copied(running), buffer.clone()
    weight, _ = partial(absorb, softcap=None)(running, buffer)
    right, _ = partial(plain, softcap=None)(theirs, logits)
    assert_same_statistics(running, theirs)
    torch.testing.assert_close(weight, right, rtol=2e-5, atol=2e-6)
    if not known:
        assert (running.sample - 40960).tolist()[3:] == [30, 0, width - 1]


@for_each(dtype=[torch.float32, *LOW_PRECISION])
def test_of_equal_logits_the_first(
    library: Library, install: Callable[[Library], None], dtype: torch.dtype
) -> None:
    install(library)
    running, buffer, absorb, _ = one_tile(
        library.device, TILE, dtype, spare=0, rows=40, known=False
    )
    places = torch.randperm(TILE, generator=torch.Generator().manual_seed(0))[: 40 * 3].view(40, 3)
    places[20:30, 1] = places[20:30, 0] ^ 1  # in the same 16 bytes
    places[30:, 1] = (places[30:, 0] + TILE // 2) % TILE  # in the same thread's registers
    places = places.to(buffer.device)
    buffer.scatter_(1, places, 29.0)
    running.top[::4] = 29.0  # and of an earlier tile
    partial(absorb, softcap=None)(running, buffer)
    first = 40960 + places.amin(dim=1)
    first[::4] = 0
    assert torch.equal(running.argmax, first)
    assert (running.top == 29.0).all()
    assert (running.second == 29.0).all()


@for_each(dtype=[torch.float32, torch.bfloat16])
def test_an_id_is_drawn_for_its_share_of_the_uniform_numbers(
    library: Library, install: Callable[[Library], None], dtype: torch.dtype
) -> None:
    install(library)
    ids, rows = [0, 3, 4, 127, 128, 1023, 1024, TILE - 1], 8 * 4  # sums without rounding
    running, buffer, absorb, _ = one_tile(
        library.device, TILE, dtype, spare=0, rows=rows, known=False
    )
    buffer[:] = MASKED
    buffer[:, ids] = 5.0
    inside = torch.arange(rows, device=buffer.device) / rows  # the first of a share belongs to it
    absorb = partial(absorb, softcap=None, temperature=torch.ones_like(inside))
    absorb(running, buffer, uniforms=(inside.clamp(min=0.1), inside))
    assert (running.sample - 40960).tolist() == [place for place in ids for _ in range(4)]


@for_each(dtype=[torch.float32, torch.bfloat16])
def test_an_id_without_weight_is_never_drawn(
    library: Library, install: Callable[[Library], None], dtype: torch.dtype
) -> None:
    """Uniform numbers at the very border of two ids, where rounding decides, and at both ends."""
    install(library)
    rows = 96
    running, buffer, absorb, _ = one_tile(
        library.device, TILE, dtype, spare=0, rows=rows, known=False
    )
    generator = torch.Generator().manual_seed(0)
    gone = torch.rand(rows, TILE // 64, generator=generator) < 0.7
    buffer.masked_fill_(gone.repeat_interleave(64, dim=1).to(buffer.device), MASKED)
    buffer[:, -64:] = MASKED
    # Some rows with only a few ids: an ordinary run of 16 bytes then holds zeros as well.
    buffer[::3].masked_fill_(
        torch.rand(rows // 3, TILE, generator=generator).to(buffer.device) < 0.9, MASKED
    )
    temperature = torch.ones(rows, device=buffer.device)
    cumulative = (buffer.double() - buffer.amax(dim=1, keepdim=True)).exp().cumsum(dim=1)
    border = torch.randint(TILE, (rows, 1), generator=generator).to(buffer.device)
    inside = (cumulative.gather(1, border)[:, 0] / cumulative[:, -1]).float()
    inside[::5], inside[1::5] = 1 - 2**-24, 2**-24
    absorb = partial(absorb, softcap=None, temperature=temperature)
    weight, _ = absorb(running, buffer, uniforms=(inside * 0 + 0.5, inside))
    drawn = (running.sample - 40960)[:, None]
    assert (weight.gather(1, drawn) > 0).all()
    upper, total = cumulative.gather(1, drawn)[:, 0], cumulative[:, -1]
    target, slack = inside * total, 1e-6 * total
    assert (target <= upper + slack).all()
    assert (target >= upper - weight.gather(1, drawn)[:, 0] * 1.01 - slack).all()


def test_what_makes_no_sense_is_refused(
    library: Library, install: Callable[[Library], None]
) -> None:
    install(library)
    running, buffer, absorb, _ = one_tile(
        library.device, TILE + 1, torch.float32, spare=0, known=False
    )
    before = buffer.clone()
    with pytest.raises(AssertionError, match="error -1"):
        absorb(running, buffer)
    with pytest.raises(AssertionError, match="error -1"):
        absorb(running, buffer[:, :0])
    assert torch.equal(buffer, before)
    empty = RunningStats.initial(0, torch.device(library.device))
    nothing = buffer[:0, :TILE]
    none = {"temperature": nothing[:, 0], "uniforms": (nothing[:, 0], nothing[:, 1])}
    assert partial(absorb, **none)(empty, nothing)[1].shape == (0,)


# ---- the emulated block itself ----


def test_the_order_of_threads_changes_no_bit(
    emulation: Library, install: Callable[[Library], None]
) -> None:
    install(emulation)
    first = under_order(emulation, 0)
    for seed in range(1, 6):
        assert equal(first, under_order(emulation, seed))


def under_order(library: Library, seed: int) -> list[Tensor]:
    running, buffer, absorb, _ = one_tile("cpu", TILE, torch.bfloat16, spare=0)
    library.compiled.emulate_order(seed)
    weight, shrink = absorb(running, buffer)
    return [*of(running).values(), weight, shrink]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("barrier", [1, 2])
def test_a_missing_barrier_shows(
    barrier: int,
    tmp_path: Path,
    install: Callable[[Library], None],
    emulation: Library,
) -> None:
    install(emulation)
    right = under_order(emulation, 0)
    text, at = SOURCE.read_text(), 0
    for _ in range(barrier):
        at = text.index("__syncthreads();", at + 1)
    mutant = tmp_path / "row_pass.cu"
    mutant.write_text(text[:at] + text[at:].replace("__syncthreads();", "", 1))
    library = emulate(tmp_path, mutant)
    install(library)
    wrong = [under_order(library, seed) for seed in range(3)]
    assert not any(equal(right, other) for other in wrong)


# ---- nvcc ----


@needs_nvcc
def test_nvcc_compiles_it_without_spills(tmp_path: Path) -> None:
    """For Hopper and Blackwell; 64 registers let four blocks of 256 threads onto a processor."""
    built = tmp_path / "_row_pass_cuda.so"
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ("90a", "120a")]
    options = "-O3 -std=c++17 --shared -Xcompiler -fPIC,-Wall,-Wextra -Xptxas -v"
    said = run("nvcc", *options.split(), "-Werror=all-warnings", *targets, SOURCE, "-o", built)
    print(said)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(used) == 2 * 3, "architectures and dtypes"
    assert max(used) <= 64
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert frames == [("0", "0", "0")] * len(used)
    absorb = cuda.load(tmp_path).vd_absorb_cuda  # CUDA's runtime is in it
    assert absorb(native.TilePointers(width=0), native.RunningPointers(), None) == -1


@pytest.mark.parametrize("there", [True, False])
def test_the_package_builds_it_where_nvcc_is(tmp_path: Path, there: bool) -> None:
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "vllm_diffusion/__init__.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "$@" >"$2"\n')
    compiler.chmod(0o755)
    # No CC: the part in C++ is built elsewhere, and may fail here.
    path = {"PATH": str(compiler.parent) if there else str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        env={**os.environ, **path, "CC": "false", "CXX": "false", "VLLM_DIFFUSION_HEAD": "cuda"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    built = list(tmp_path.glob("out/vllm_diffusion/head/_row_pass_cuda.*so"))
    if there:
        assert "csrc/head/row_pass.cu" in built[0].read_text()
    else:
        assert not built
        assert "leads to nvcc" in result.stderr + result.stdout
