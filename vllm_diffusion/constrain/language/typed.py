"""The types of a call's arguments, which vLLM's parser reads as texts, from the tool's schema.

vLLM guesses from ``type`` and ``enum`` of what ``properties`` and ``items`` name, and takes
everything else for a text: what a ``$ref`` leads to, constants, members and items named otherwise.
Here the whole schema is looked at, value by value, so that a part of a stream means what the whole
means. No expression of a client's is searched for: replies are parsed where all of them are.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from vllm_diffusion.constrain.language.addresses import followed, located

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CHOICES = ("anyOf", "oneOf", "allOf")
_CONDITIONS = ("if", "then", "else")
_SEARCHING = ("pattern", "patternProperties", "additionalProperties", "unevaluatedProperties")
_Validator = extend(Draft202012Validator, dict.fromkeys(_SEARCHING, lambda *_: ()))


class Types:
    """Which parts of a schema speak of a value, and what they let it be.

    Args:
        schema: of the arguments of a tool.
    """

    def __init__(self, schema: Any) -> None:
        self._root = located(schema)
        self._validator = _Validator(self._root)

    def typed(self, raw: Mapping[str, Any], guessed: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments in the types of the schema, as far as it knows one that fits.

        Args:
            raw: as they were written, every value a text, an object or an array.
            guessed: the same as vLLM reads them; they stay so where they are valid.
        """
        found: dict[str, Any] = self._value(raw, guessed, [self._root])
        return found

    def _value(self, raw: Any, guessed: Any, schemas: list[Any]) -> Any:
        """A value, of which some schemas speak, and all in it."""
        parts = list(self._parts(schemas))
        match raw:
            case dict() if isinstance(guessed, dict):
                return {
                    name: self._value(raw.get(name, each), each, self._members(parts, name))
                    for name, each in guessed.items()
                }
            case list() if isinstance(guessed, list) and len(raw) == len(guessed):
                return [
                    self._value(one, other, self._items(parts, index))
                    for index, (one, other) in enumerate(zip(raw, guessed, strict=True))
                ]
            case str():
                options = [guessed, raw]
                with suppress(ValueError):
                    options.append(json.loads(raw))
                valid = (each for each in options if self._is_valid(each, parts))
                return next(valid, guessed)
        return guessed

    def _is_valid(self, value: Any, parts: list[Any]) -> bool:
        return not parts or any(self._validator.evolve(schema=p).is_valid(value) for p in parts)

    def _parts(self, schemas: list[Any]) -> Iterator[Any]:
        """Schemas, but those that only choose among others, and all that they choose from."""
        pending, seen = list(schemas), set()
        for schema in pending:
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            inner = [followed(self._root, schema["$ref"])] if "$ref" in schema else []
            for key in _CHOICES:
                inner += schema.get(key, ())
            inner += [schema[key] for key in _CONDITIONS if key in schema]
            pending += inner
            yield schema

    @staticmethod
    def _members(parts: list[Any], name: str) -> list[Any]:
        found = []
        for part in parts:
            own = [part["properties"][name]] if name in part.get("properties", {}) else []
            others = [part[key] for key in ("additionalProperties",) if key in part]
            found += own or [*part.get("patternProperties", {}).values(), *others]
        return found

    @staticmethod
    def _items(parts: list[Any], index: int) -> list[Any]:
        found = []
        for part in parts:
            first = part.get("prefixItems", ())
            if index < len(first):
                found.append(first[index])
            elif "items" in part:
                found.append(part["items"])
        return found
