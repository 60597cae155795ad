"""A patch on vLLM as data, and applying patches once per process.

A row says what it changes, why, where the reason can be read upstream, and when it can go; its
three functions say whether it applies here, how to install it, and whether the installed vLLM still
needs it. The rows are in `patches.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One change to vLLM, or to a library it needs, made from outside."""

    name: str
    """Unique, short, in words and hyphens: it appears in the log line and in the doctor."""
    target: str
    """What is replaced, as a dotted name."""
    why: str
    """What goes wrong without it, in one sentence."""
    upstream_reference: str
    """Where the reason can be read: file and name in vLLM, or an issue."""
    remove_when: str
    """What must be true of the lowest tested vLLM for this row to be deleted."""
    applies: Callable[[], bool]
    """Whether it has work to do in this process. Cheap; may import `vllm.platforms`."""
    install: Callable[[], None]
    """Make the change. Called at most once per process, and only if `applies()`."""
    needed: Callable[[], bool]
    """Whether the installed version of the target still needs it. Only tests call this; it fails
    loudly (`AttributeError`, `ImportError`) when the target is gone."""


_installed: dict[str, Patch] = {}


def apply(patches: Iterable[Patch]) -> tuple[str, ...]:
    """Install the patches that apply here, in order, and return the names of those active.

    A patch is installed once per process: later calls only report it. Processes forked afterwards
    inherit both the change and this memory of it. Raises `ValueError` when two different patches
    share a name.
    """
    rows = tuple(patches)
    for patch in rows:
        known = _installed.get(patch.name)
        if known is None:
            if patch.applies():
                patch.install()
                _installed[patch.name] = patch
        elif known is not patch:
            raise ValueError(f"two patches have the name {patch.name!r}")
    return tuple(patch.name for patch in rows if patch.name in _installed)


def active() -> tuple[str, ...]:
    """Names of all patches installed in this process, in the order they were installed."""
    return tuple(_installed)
