"""A patch on vLLM as data, and installing patches once per process.

A row says what it changes, why, where the reason can be read upstream, and when it can go. The
functions that do it are named, not imported, so that a table of rows costs no process more than it
uses. Whoever owns the table registers it once; from then on any room can have the rows of a stage
installed without knowing them.

Names are written as entry points are, `package.module:attribute.attribute`.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from enum import Enum
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


class Stage(Enum):
    """When a patch is installed, in the order of a process's life."""

    TORCH = "with torch"
    """When torch is imported, which comes before anything of vLLM."""
    PLUGIN = "with vLLM"
    """When vLLM loads its plugins, in every process that it starts."""
    SERVING = "when serving"
    """In the process that is about to serve a diffusion model. What the rows import is there
    already; it would only slow down the start of every other process."""
    WORKER = "in workers"
    """In the worker of a diffusion model on a CPU host without Triton, before its first step."""
    ADAPTERS = "in workers with LoRA"
    """While a diffusion model is built with LoRA on, before its first layer."""


def everywhere() -> bool:
    """For `Patch.applies`: a row that no host can do without."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One change to vLLM, or to a library it needs, made from outside."""

    name: str
    """Unique, short, in words and hyphens: it appears in the log line and in the doctor."""
    stage: Stage
    """When it is installed."""
    wraps: Mapping[str, str] = field(default_factory=dict)
    """By the name of what is replaced, the name of its wrapper: a function that takes what stands
    there and returns what shall. Of a property, classmethod or staticmethod it takes and returns
    the function; a function inherits name, signature and documentation of the one it replaces."""
    installs: Mapping[str, str] = field(default_factory=dict)
    """For changes that are not the replacement of attributes: by the name of what is changed, the
    name of a function without arguments that changes it."""
    why: str
    """What goes wrong without it, in one sentence."""
    upstream_reference: str
    """Where the reason can be read: file and name in vLLM, or an issue."""
    remove_when: str
    """What must be true of the lowest tested vLLM for this row to be deleted."""
    applies: Callable[[], bool] = everywhere
    """Whether it has work to do in this process. Cheap; may import `vllm.platforms`."""
    needed: str
    """Name of a function without arguments: whether the installed version of the target still needs
    the row. Only tests call it; it fails loudly (`AttributeError`, `ImportError`) when the target
    is gone."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of everything it changes."""
        return (*self.wraps, *self.installs)

    def is_needed(self) -> bool:
        """Call what `needed` names."""
        return bool(resolve_name(self.needed)())


class Place(NamedTuple):
    """Where an attribute stands."""

    owner: Any
    """A module or a class."""
    attribute: str

    @property
    def value(self) -> Any:
        """What stands there, a classmethod or property as such."""
        return inspect.getattr_static(self.owner, self.attribute)


_registered: dict[str, Patch] = {}
_installed: dict[str, Patch] = {}


def register(patches: Iterable[Patch]) -> None:
    """Make patches known to `apply_stage`, in order. Registering a patch again changes nothing.

    Raises `ValueError` when two different patches share a name.
    """
    for patch in patches:
        if _registered.setdefault(patch.name, patch) is not patch:
            raise ValueError(f"two patches have the name {patch.name!r}")


def apply_stage(*stages: Stage) -> tuple[str, ...]:
    """Install the registered patches of some stages, as `apply` does.

    Raises `RuntimeError` when there is none: then nobody has registered the table.
    """
    patches = [patch for patch in _registered.values() if patch.stage in stages]
    if not patches:
        named = ", ".join(stage.name for stage in stages)
        raise RuntimeError(
            f"no patch of stage {named} is registered: vllm_diffusion.plugin.register() has not "
            "run in this process"
        )
    return apply(patches)


def apply(patches: Iterable[Patch]) -> tuple[str, ...]:
    """Install the patches that apply here, in order, and return the names of those active.

    A patch is installed once per process: later calls only report it. Processes forked afterwards
    inherit both the change and this memory of it. Raises `ValueError` when two different patches
    share a name.
    """
    rows = tuple(patches)
    register(rows)
    for patch in rows:
        if patch.name not in _installed and patch.applies():
            _install(patch)
            _installed[patch.name] = patch
    return tuple(patch.name for patch in rows if patch.name in _installed)


def active() -> tuple[str, ...]:
    """Names of all patches installed in this process, in the order they were installed."""
    return tuple(_installed)


def place_of(target: str) -> Place:
    """Find what a row replaces.

    Args:
        target: `package.module:attribute` or `package.module:class.attribute`.

    Raises:
        ImportError: there is no such module.
        AttributeError: there is no such class; for the attribute `Place.value` raises it.
    """
    module, _, path = target.partition(":")
    owner, _, attribute = path.rpartition(".")
    return Place(resolve_name(f"{module}:{owner}"), attribute)


def replacement(original: Any, wrap: Callable[[Any], Any]) -> Any:
    """What `wrap` puts in the place of an attribute, the same kind of attribute.

    Args:
        original: what stands there: a function, method, property, class or any object.
        wrap: takes it, or its function, and returns what replaces that.
    """
    match original:
        case classmethod() | staticmethod():
            return type(original)(_wrapped(original.__func__, wrap))
        case property():
            return original.getter(_wrapped(original.fget, wrap))
    return _wrapped(original, wrap)


def _wrapped(original: Any, wrap: Callable[[Any], Any]) -> Any:
    changed = wrap(original)
    return functools.wraps(original)(changed) if inspect.isroutine(original) else changed


def _install(patch: Patch) -> None:
    # All are wrapped before any is set: a wrapper that fails leaves vLLM as it was.
    for place, changed in list(_replacements(patch.wraps)):
        setattr(place.owner, place.attribute, changed)
    for install in patch.installs.values():
        resolve_name(install)()


def _replacements(wraps: Mapping[str, str]) -> Iterator[tuple[Place, Any]]:
    for target, wrap in wraps.items():
        place = place_of(target)
        yield place, replacement(place.value, resolve_name(wrap))
