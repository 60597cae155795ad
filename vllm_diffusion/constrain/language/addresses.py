"""Where the references of a JSON schema lead: every address in it as a pointer from its root."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

Schema = dict[str, Any] | bool

_SCHEMAS = {
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "items", "contains"),
    *("unevaluatedItems", "not", "if", "then", "else", "contentSchema"),
}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_MAPS = {
    *("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"),
    "dependencies",
}
_ADDRESSES = {"$id", "$anchor", "$dynamicAnchor", "$dynamicRef"}


def located(root: Schema) -> Schema:
    """The same schema, every reference a pointer from the root, as far as it leads into it.

    Addresses are gone then. A dynamic reference is a plain one where its name stands once.
    """
    if not _has_addresses(root):
        return root
    result: Schema = _Addresses(root).rewritten(root, "#", "")
    return result


def followed(root: Any, pointer: str) -> Any:
    """What a JSON pointer, as in ``#/$defs/name``, leads to; None: nothing."""
    target = root
    for part in unquote(pointer).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(key) if isinstance(target, list) else key]
        except (LookupError, TypeError, ValueError):
            return None
    return target


def circular(root: Schema) -> set[str]:
    """The references of a schema that lead back to themselves."""
    leads = {pointer: _references(followed(root, pointer)) for pointer in _references(root)}
    found = set()
    for start, first in leads.items():
        pending = [*first]
        seen = {*pending}
        for pointer in pending:
            more = leads[pointer] - seen
            seen |= more
            pending += more
        if start in seen:
            found.add(start)
    return found


def _references(schema: Any) -> set[str]:
    """Every ``$ref`` in a schema."""
    return {
        part["$ref"]
        for part in _parts(schema)
        if isinstance(part, dict) and isinstance(part.get("$ref"), str)
    }


def _has_addresses(schema: Any) -> bool:
    return any(isinstance(part, dict) and _ADDRESSES & part.keys() for part in _parts(schema))


def _parts(schema: Any) -> list[Any]:
    pending = [schema]
    for part in pending:
        if isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return pending


class _Addresses:
    """The resources and anchors of a schema."""

    def __init__(self, root: Schema) -> None:
        self._resources: dict[str, str] = {"": "#"}
        self._anchors: dict[tuple[str, str], str] = {}
        self._dynamic: dict[str, list[str]] = {}
        self._collect(root, "#", "")

    def rewritten(self, schema: Any, pointer: str, base: str) -> Any:
        """A schema at a place, its references followed, without addresses."""
        if not isinstance(schema, dict):
            return schema
        base = _base_of(schema, base)
        parts = {
            (key, index): self.rewritten(part, where, base)
            for key, index, part, where in inside(schema, pointer)
        }
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in {"$id", "$anchor", "$dynamicAnchor"}:
                continue
            if (key, None) in parts:
                result[key] = parts[key, None]
            elif isinstance(value, list):
                result[key] = [parts.get((key, n), each) for n, each in enumerate(value)]
            elif isinstance(value, dict):
                result[key] = {name: parts.get((key, name), each) for name, each in value.items()}
            else:
                result[key] = value
        if isinstance(schema.get("$ref"), str):
            result["$ref"] = self._pointer(schema["$ref"], base)
        dynamic = schema.get("$dynamicRef")
        if isinstance(dynamic, str) and "$ref" not in schema:
            to = self._pointer(dynamic, base)
            others = self._dynamic.get(urldefrag(dynamic).fragment, [to])
            if to.startswith("#") and (others == [to] or to not in others):
                del result["$dynamicRef"]
                result["$ref"] = to
        return result

    def _collect(self, schema: Any, pointer: str, base: str) -> None:
        if not isinstance(schema, dict):
            return
        base = _base_of(schema, base)
        if isinstance(schema.get("$id"), str) or pointer == "#":
            self._resources[base] = pointer
            name = urldefrag(str(schema.get("$id", ""))).fragment
            if name:  # as older drafts wrote anchors
                self._anchors[base, name] = pointer
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(key), str):
                self._anchors[base, schema[key]] = pointer
        if isinstance(schema.get("$dynamicAnchor"), str):
            self._dynamic.setdefault(schema["$dynamicAnchor"], []).append(pointer)
        for _, _, part, where in inside(schema, pointer):
            self._collect(part, where, base)

    def _pointer(self, reference: str, base: str) -> str:
        """A reference as a pointer from the root; as it was where it leads elsewhere."""
        whole = base + reference if reference.startswith("#") else urljoin(base, reference)
        resource, fragment = urldefrag(whole)
        if fragment and not fragment.startswith("/"):
            return self._anchors.get((resource, unquote(fragment)), reference)
        if resource not in self._resources:
            return reference
        return self._resources[resource] + fragment


def _base_of(schema: dict[str, Any], base: str) -> str:
    """What references in a schema start from."""
    own = schema.get("$id")
    if not isinstance(own, str) or own.startswith("#"):
        return base
    return urldefrag(urljoin(base, own)).url


def inside(schema: dict[str, Any], pointer: str) -> list[tuple[str, Any, Any, str]]:
    """The schemas in a schema: keyword, name or number there, schema, and pointer."""
    found: list[tuple[str, Any, Any, str]] = []
    for key, value in schema.items():
        if key in _SCHEMAS and isinstance(value, dict):
            found.append((key, None, value, f"{pointer}/{key}"))
        elif key in _LISTS and isinstance(value, list):
            found += [(key, n, each, f"{pointer}/{key}/{n}") for n, each in enumerate(value)]
        elif key in _MAPS and isinstance(value, dict):
            found += [
                (key, name, each, f"{pointer}/{key}/{_escaped(name)}")
                for name, each in value.items()
            ]
    return found


def _escaped(name: str) -> str:
    return quote(name.replace("~", "~0").replace("/", "~1"), safe="~")
