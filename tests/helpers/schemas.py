"""JSON schemas by kind: each with instances that are valid and must be accepted, and others."""

S, J, N, B, Z = ({"type": kind} for kind in ("string", "integer", "number", "boolean", "null"))
ADDRESS = {"type": "object", "properties": {"street": S, "no": J}, "required": ["street"]}
TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "value": J,
                "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["value"],
        }
    },
    "$ref": "#/$defs/tree",
}


def obj(properties, required=(), **more):
    return {"type": "object", "properties": properties, "required": list(required), **more}


def arr(items=None, **more):
    return {"type": "array", **({} if items is None else {"items": items}), **more}


def string(**more):
    return {"type": "string", **more}


# name: schema, valid instances that must be accepted, instances that must not
TABLE = {
    "any": ({}, [1, None, "x", [1, {"a": []}], {}], []),
    "true": (True, [0], []),
    "null": (Z, [None], [0]),
    "boolean": (B, [True, False], [1]),
    "integer": (J, [0, -1, 12, 10**30], [1.5, "1"]),
    "number": (N, [0, -0.5, 1e300, 2.5e-7], ["1"]),
    "types": ({"type": ["string", "null", "integer"]}, ["a", None, 3], [1.5, True]),
    "integer and number": ({"type": ["integer", "number"]}, [1, 1.5], []),
    "minimum": ({**J, "minimum": 7}, [7, 8, 10, 99, 12345], [6, 0, -7]),
    "maximum": ({**J, "maximum": 120}, [120, 0, -5, 99], [121, 1000]),
    "negative range": ({**J, "minimum": -25, "maximum": -3}, [-25, -3, -10], [-26, -2, 0, 3]),
    "range over zero": ({**J, "minimum": -5, "maximum": 120}, [-5, 0, 120, 99], [-6, 121]),
    "exclusive": ({**J, "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10]),
    "fractional bounds": ({**J, "minimum": 1.5, "maximum": 3.2}, [2, 3], [1, 4]),
    "huge bound": ({**J, "minimum": 1e30}, [10**31, int(1e30)], [10**30]),
    "both bounds": ({**N, "minimum": 1, "exclusiveMinimum": 1}, [1.01, 2], [1]),
    "number range": ({**N, "minimum": 0.5, "maximum": 3}, [0.5, 3, 1.25, 2.999], [0.4, 3.1, -1]),
    "probability": ({**N, "minimum": 0, "maximum": 1}, [0, 1, 0.1, 0.999], [1.1, -0.1]),
    "open number": ({**N, "exclusiveMinimum": 0.1}, [0.11, 5, 1e9], [0.1, 0.09, -3]),
    "negative number": ({**N, "maximum": -1.25}, [-1.25, -2, -1.3], [-1.2, 0, 1]),
    "tiny": ({**N, "exclusiveMinimum": -1e-9, "exclusiveMaximum": 1e-9}, [0], [1e-9, 1]),
    "bounds of a double": (
        {**N, "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        [0, -1.5, 10**20, -(10**20), 0.001],
        ["1"],
    ),
    "smallest double": ({**N, "minimum": 5e-324}, [1e-3, 1, 1000.5], [0, -1]),
    "whole up to a double": ({**J, "minimum": 0, "maximum": 1e300}, [0, 10**20], [-1]),
    "256 bits": ({**J, "minimum": -(2**255), "maximum": 2**256 - 1}, [2**256 - 1], [2**256]),
    "large range": ({**N, "minimum": 1e15, "maximum": 1e22}, [10**15, 10**22, 10**20], [1, 10**23]),
    "string": (S, ["", 'a"b\\c', "\n\t\r\b\f\x00\x1f\x7f", "é€😀", "/"], [1]),
    "length": (string(minLength=2, maxLength=3), ["ab", "é😀€", '"\\\n'], ["", "a", "abcd"]),
    "counts as decimals": (
        {"anyOf": [string(minLength=2.0, maxLength=3.0), arr(J, minItems=1.0, maxItems=2.0)]},
        ["ab", [1], [1, 2]],
        ["a", [], [1, 2, 3]],
    ),
    "no length": (string(maxLength=0), [""], ["a"]),
    "long string": (string(minLength=300), ["x" * 300, "é" * 400], ["x" * 299]),
    "pattern": (string(pattern="^a[bé]+$"), ["ab", "aébé"], ["a", "xab", "ac"]),
    "pattern inside": (string(pattern="b"), ["b", 'a"b\n', "éb"], ["", "a"]),
    "pattern of a start": (string(pattern="^x-"), ["x-", "x-1"], ["ax-"]),
    "pattern of either": (string(pattern="^a|b$"), ["ax", "xb"], ["xa"]),
    "pattern negated": (string(pattern="^[^a]$"), ["b", "\n", '"', "😀"], ["a", "bb"]),
    "pattern classes": (string(pattern=r"^\d\D\w\W\s\S$"), ["1aa! x"], ["aaaaaa"]),
    "pattern dot": (string(pattern="^.{2}$"), ["ab", 'é"'], ["a", "a\n"]),
    "pattern with escapes": (string(pattern=r'^["\\/\t]+$'), ['"\\/\t'], ["a", ""]),
    "date": (string(format="date"), ["2024-02-29", "1999-12-31"], ["2023-02-29", "0000-01-01"]),
    "date-time": (string(format="date-time"), ["2024-01-01T00:00:00Z"], ["2024-01-01"]),
    "time": (string(format="time"), ["23:59:59.5+02:00"], ["24:00:00Z"]),
    "duration": (string(format="duration"), ["P1Y2M3DT4H5M6S", "PT1H", "P4W"], ["P", "PT"]),
    "uuid": (string(format="uuid"), ["12345678-1234-1234-1234-123456789abc"], ["x"]),
    "ipv4": (string(format="ipv4"), ["255.0.10.1"], ["256.0.0.1", "1.1.1"]),
    "ipv6": (string(format="ipv6"), ["::", "1::8", "1:2:3:4:5:6:7:8", "::1"], ["1:2", ":::"]),
    "email": (string(format="email"), ["a.b+c@d-e.org"], ["a@b", "@b.c"]),
    "uri": (string(format="uri"), ["https://a.b/c?d=%20#e"], ["a b", "nowhere"]),
    "hostname": (string(format="hostname"), ["a-b.example"], ["-a", ""]),
    "const": ({"const": {"a": [1, "é\n\u0001"]}}, [{"a": [1, "é\n\u0001"]}], [{}]),
    "enum": ({"enum": ["x\t", 1.5, None, True, {"a": [1]}]}, ["x\t", 1.5, None, True], [1, "x"]),
    "enum with siblings": ({"enum": [1, "a", 3, None], "type": "integer", "minimum": 2}, [3], [1]),
    "enum with not": ({"enum": [1, 2], "not": {"const": 1}}, [2], [1]),
    "array": (arr(J), [[], [1], [1, 2, 3]], [["a"], 1]),
    "array of anything": (arr(), [[], [1, "a", [None]]], [{}]),
    "items bounds": (arr(J, minItems=2, maxItems=3), [[1, 2], [1, 2, 3]], [[], [1], [1, 2, 3, 4]]),
    "no items": (arr(J, maxItems=0), [[]], [[1]]),
    "one unique": (arr(J, maxItems=1, uniqueItems=True), [[], [1]], [[1, 1]]),
    "tuple": (arr(prefixItems=[S, J], items=False), [["a", 1], ["a"], []], [[1], ["a", 1, 2]]),
    "tuple and more": (arr(B, prefixItems=[S], minItems=2), [["a", True]], [["a"], [True, True]]),
    "short tuple": (
        arr(prefixItems=[S, J, B], maxItems=2, minItems=1),
        [["a"]],
        [[], ["a", 1, True]],
    ),
    "nothing in it": (arr(False), [[]], [[1]]),
    "object": ({"type": "object"}, [{}, {"a": 1, "é\n": {"b": []}}], [[], 1]),
    "properties": (
        obj({"a": J, "b": S}),
        [{}, {"a": 1}, {"b": ""}, {"a": 1, "b": "x"}],
        [{"a": ""}],
    ),
    "required": (obj({"a": J, "b": S}, "b"), [{"b": ""}, {"a": 1, "b": ""}], [{}, {"a": 1}]),
    "required unnamed": ({"type": "object", "required": ["x"]}, [{"x": [1]}], [{}]),
    "required additional": (obj({"a": J}, "z", additionalProperties=S), [{"z": ""}], [{"z": 1}]),
    "additional": (obj({}, additionalProperties=J), [{}, {"x": 1, "": 2, '"': 3}], [{"x": ""}]),
    "additional beside": (
        obj({"a": J, "é\n": Z, 'q"': Z}, additionalProperties=S),
        [{"a": 1, "é\n": None, 'q"': None, "ab": "", "é": "x"}, {"b": ""}],
        [{"a": ""}, {"é\n": ""}, {'q"': ""}],
    ),
    "open": (obj({"a": J}, additionalProperties=True), [{"a": 1, "b": [None]}], [{"a": "x"}]),
    "closed": (obj({"a": J}, additionalProperties=False), [{}, {"a": 1}], [{"b": 1}]),
    "count of named": (
        obj({"a": J, "b": J, "c": J}, minProperties=1, maxProperties=2, additionalProperties=False),
        [{"a": 1}, {"b": 1, "c": 2}],
        [{}, {"a": 1, "b": 1, "c": 1}],
    ),
    "count of any": (
        obj({}, maxProperties=2, minProperties=1, additionalProperties=J),
        [{"x": 1}],
        [{}],
    ),
    "pattern of names": (
        {"type": "object", "patternProperties": {"^x_": J}, "additionalProperties": False},
        [{}, {"x_a": 1, "x_": 2}],
        [{"x_a": ""}, {"y": 1}],
    ),
    "names": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": J},
        [{"ab": 1}],
        [{"A": 1}, {"ab": ""}],
    ),
    "names listed": (
        {"type": "object", "propertyNames": {"enum": ["a", 1]}},
        [{"a": 1}],
        [{"b": 1}],
    ),
    "unevaluated": (
        {**ADDRESS, "unevaluatedProperties": False},
        [{"street": ""}],
        [{"x": 1, "street": ""}],
    ),
    "unevaluated alone": ({"type": "object", "unevaluatedProperties": False}, [{}], [{"x": 1}]),
    "unevaluated items": (arr(prefixItems=[J], unevaluatedItems=False), [[1]], [[1, 2]]),
    "nested": (
        obj({"to": ADDRESS, "list": arr(ADDRESS, maxItems=2)}, ["to"]),
        [{"to": {"street": "x", "no": 1}, "list": [{"street": ""}]}],
        [{"to": {}}],
    ),
    "anyOf": ({"anyOf": [S, arr(S)]}, ["a", ["a", "b"]], [1]),
    "anyOf merged": (
        {
            "type": "object",
            "properties": {"a": J, "b": J},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
        [{}],
    ),
    "oneOf by type": ({"oneOf": [S, Z, J]}, ["a", None, 3], [1.5]),
    "oneOf by constant": (
        {
            "oneOf": [
                obj({"kind": {"const": "a"}, "x": J}, ["kind", "x"]),
                obj({"kind": {"enum": ["b", "c"]}, "y": S}, ["kind", "y"]),
            ]
        },
        [{"kind": "a", "x": 1}, {"kind": "c", "y": ""}],
        [{"kind": "a", "y": ""}, {"kind": "d"}],
    ),
    "allOf": ({"allOf": [S, {"maxLength": 3}, {"minLength": 1}]}, ["a"], ["", "abcd", 1]),
    "allOf objects": (
        {"allOf": [ADDRESS, obj({"zip": S, "no": {"minimum": 3}}, ["zip"])]},
        [{"street": "", "no": 3, "zip": ""}],
        [{"street": ""}, {"street": "", "no": 1, "zip": ""}],
    ),
    "allOf enums": (
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}, {"const": 3}]},
        [3],
        [2, 4],
    ),
    "ref": (
        {"$defs": {"a/b": S}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}},
        [["x"]],
        [[1]],
    ),
    "ref with siblings": (
        {"$defs": {"s": S}, "$ref": "#/$defs/s", "maxLength": 2, "description": "short"},
        ["ab"],
        ["abc", 1],
    ),
    "address": ({"$id": "https://a.b/c", "$ref": "#/$defs/s", "$defs": {"s": S}}, ["x"], [1]),
    "recursive": (
        TREE,
        [{"value": 1}, {"value": 1, "kids": [{"value": 2, "kids": []}]}],
        [{"kids": []}],
    ),
    "recursive root": (
        obj({"next": {"anyOf": [{"$ref": "#"}, Z]}}),
        [{"next": {"next": None}}],
        [{"next": 1}],
    ),
    "implied types": ({"maxLength": 2}, ["ab"], ["abc"]),
    "annotations": ({**J, "title": "t", "default": 1, "examples": [2], "x-ours": {}}, [1], ["a"]),
    "optional field": (
        obj({"a": {"anyOf": [J, Z], "default": None}}),
        [{}, {"a": None}],
        [{"a": ""}],
    ),
    "not a type": ({"not": {"type": ["string", "object"]}}, [1, None, [], True], ["a", {}]),
    "not a value": (
        {"type": ["string", "integer", "null"], "not": {"enum": ["a", "b", 3, 5]}},
        ["", "ab", 4, 2, 6, None],
        ["a", "b", 3, 5],
    ),
    "not a pattern": (string(pattern="a", **{"not": {"pattern": r"\d"}}), ["a", "xa"], ["a1", ""]),
    "forbidden name": (obj({"a": J, "b": {"not": {}}}), [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    "not both": (
        {**obj({"a": J, "b": J}), "not": {"required": ["a", "b"]}},
        [{}, {"a": 1}, {"b": 1}],
        [{"a": 1, "b": 2}],
    ),
    "if": (
        {
            **obj({"kind": {"enum": ["x", "y"]}, "n": {}}, ["kind", "n"]),
            "if": {"properties": {"kind": {"const": "x"}}},
            "then": {"properties": {"n": J}},
            "else": {"properties": {"n": S}},
        },
        [{"kind": "x", "n": 1}, {"kind": "y", "n": "1"}],
        [{"kind": "x", "n": "1"}, {"kind": "y", "n": 1}],
    ),
    "dependent names": (
        obj({"a": J, "b": J, "c": J}, dependentRequired={"a": ["b"], "b": []}),
        [{}, {"b": 1}, {"a": 1, "b": 2}, {"c": 3}],
        [{"a": 1}, {"a": 1, "c": 1}],
    ),
    "dependent schema": (
        obj({"a": J, "b": J}, dependentSchemas={"a": {"properties": {"b": {"minimum": 5}}}}),
        [{"b": 1}, {"a": 1, "b": 5}, {"a": 1}],
        [{"a": 1, "b": 4}],
    ),
    "one of what overlaps": (
        {"oneOf": [{**J, "minimum": 3}, {**J, "maximum": 7}]},
        [2, 8, -5],
        [3, 5, 7],
    ),
    "one of what is there": (
        {**obj({"a": J, "b": J}), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "pattern and length": (
        string(pattern="^[a-z]+(-[a-z]+)*$", minLength=3, maxLength=6),
        ["abc", "ab-cde"],
        ["ab", "abcdefg", "ab-"],
    ),
    "format and pattern": (
        string(format="date", pattern="^202"),
        ["2024-02-29"],
        ["1999-01-01", "2023-02-29"],
    ),
    "two patterns": ({"allOf": [string(pattern="a"), string(pattern='"')]}, ['"a'], ["a", '"']),
    "a format of nobody": (string(format="colour"), ["", "red"], [1]),
    "multiples": ({**J, "multipleOf": 7, "minimum": 0, "maximum": 50}, [0, 7, 49], [8, 56, -7]),
    "multiples of either sign": ({**N, "multipleOf": 2.5}, [0, 5, -10], [1, -3]),
    "patterns of names": (
        {
            **obj({"ab": {"minimum": 3}}),
            "patternProperties": {"^a": J, "b$": {"maximum": 9}},
            "additionalProperties": B,
        },
        [{"ab": 4}, {"a": 99}, {"b": 1.5}, {"ab": 3, "axb": 5, "c": True}],
        [{"ab": 2}, {"ab": 10}, {"a": 1.5}, {"c": 1}, {"axb": 10}],
    ),
    "names of some length": (
        {**obj({"a": J}, additionalProperties=J), "propertyNames": {"maxLength": 2}},
        [{"a": 1}, {"bc": 1}],
        [{"abc": 1}],
    ),
    "contains": (arr({"type": ["integer", "string"]}, contains=S), [["a"], [1, "a"]], [[], [1]]),
    "contains some": (
        arr({"type": ["integer", "string"]}, contains=S, minContains=1, maxContains=2, maxItems=4),
        [["a"], [1, "a", 2, "b"]],
        [[1], ["a", "b", "c"]],
    ),
    "unique": (
        arr({"enum": ["a", "b", "c"]}, uniqueItems=True, minItems=1),
        [["b"], ["c", "a", "b"]],
        [[], ["a", "a"]],
    ),
    "many unique": (
        arr({"enum": list(range(12))}, uniqueItems=True, maxItems=3),
        [[], [0, 4, 11]],
        [[3, 3], [1, 2, 3, 4]],
    ),
    "closed parts": (
        {"allOf": [obj({"a": J, "b": J}, additionalProperties=False), obj({"a": {"minimum": 3}})]},
        [{"a": 3}],
        [{"a": 2}, {"b": "x"}],
    ),
    "evaluated by parts": (
        {"allOf": [obj({"a": J})], "properties": {"b": S}, "unevaluatedProperties": False},
        [{"a": 1}, {"b": ""}, {}],
        [{"c": 1}],
    ),
    "tuples together": (
        {"allOf": [arr(J, prefixItems=[N]), arr(prefixItems=[{"minimum": 1}, {"maximum": 5}])]},
        [[1.5, 5], [1]],
        [[0.5], [1, 6], [1, 1.5]],
    ),
    "anchors": (
        {
            "$id": "https://a.b/c",
            "$defs": {"d": {"$id": "e", "$anchor": "f", **obj({"x": {"$ref": "#f"}})}},
            "$ref": "e#f",
        },
        [{}, {"x": {"x": {}}}],
        [{"x": 1}],
    ),
}
