"""The pages a user reads: links lead somewhere, commands name files there are, no page is lost."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from helpers.cases import for_each

from vllm_diffusion.denoise.constants import KINDS, declared

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
# What commands and prose point to: a path from the root, and a module to run.
FILE = re.compile(
    r"(?<![\w/.-])((?:benchmarks|csrc|docs|examples|scripts|tests|vllm_diffusion)/[\w./*-]+\.\w+)\b"
)
MODULE = re.compile(r"python -m (vllm_diffusion[\w.]*)")


def outside_code(page: Path) -> str:
    """The page without its fenced blocks, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", outside_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@for_each(page=PAGES)
def test_links_lead_to_a_file_and_to_a_heading_of_it(page):
    broken = []
    for target, anchor in LINK.findall(outside_code(page)):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@for_each(page=PAGES)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    modules = {f"{name.replace('.', '/')}.py" for name in MODULE.findall(text)}
    named = modules | set(FILE.findall(text))
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


def test_every_page_is_in_the_index_and_within_reach_of_the_readme():
    readme, index = (ROOT / "README.md").read_text(), (DOCS / "README.md").read_text()
    names = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert {name for name in names if f"({name})" not in index} == set()
    assert {name for name in names if f"(docs/{name})" not in readme} == set()


def test_the_table_of_constants_says_what_is_declared():
    declarations = {
        name: (constant, each.default)
        for kind in KINDS.values()
        for each in fields(kind)
        for name, constant in [(each.name, declared(kind)[each.name])]
    }
    lines = ["| option | rule | values | default | effect |", "|---|---|---|---|---|"]
    for name, (constant, default) in declarations.items():
        kinds = [f"`{kind}`" for kind, record in KINDS.items() if name in declared(record)]
        of = ", ".join(kinds) if len(kinds) < len(KINDS) else "every"
        values = f"{constant.least:g} to {constant.most:g}"
        if constant.choices:
            values = ", ".join(f"`{choice}`" for choice in constant.choices)
        if constant.off is not None:
            values = f"0, or {values}"
        if constant.unit:
            values += f" {constant.unit}"
        given = "the model's" if default is MISSING else f"{default:g}"
        lines.append(f"| `diffusion_{name}` | {of} | {values} | {given} | {constant.help} |")
    page = (DOCS / "options.md").read_text()
    shown = re.search(r"<!-- constants:begin -->\n(.*?)\n<!-- constants:end -->", page, re.DOTALL)
    assert shown
    table = "\n".join(lines)
    assert shown[1] == table, f"docs/options.md should say\n\n{table}"
