"""The ``format`` of a JSON schema's string -> a regular expression that nothing else matches.

Narrower than the standards where a reader would stumble: no leap seconds, no year 0, no quoted mail
boxes, no URI without an authority, ASCII where a format lets all characters stand. A day that does
not exist is not a date.
"""

from __future__ import annotations

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(?:\d{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])"
    rf"|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_CLOCK}:[0-5]\d(?:\.\d{{1,6}})?(?:Z|[+-]{_CLOCK})"

# RFC 3339, appendix A.
_MINUTES = r"\d{1,4}M(?:\d{1,4}S)?"
_HOURS = rf"T(?:\d{{1,4}}H(?:{_MINUTES})?|{_MINUTES}|\d{{1,4}}S)"
_MONTHS = r"\d{1,4}M(?:\d{1,4}D)?"
_DAYS = rf"(?:\d{{1,4}}Y(?:{_MONTHS})?|{_MONTHS}|\d{{1,4}}D)"
_DURATION = rf"P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|\d{{1,4}}W)"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"  # of any length: a count costs a state a character
_HOST = rf"{_NAME}(?:\.{_NAME})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"

_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d{2}|[1-9]?\d)"
_GROUP = r"[0-9A-Fa-f]{1,4}"

_PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
_QUERY = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*"


def _ipv6() -> str:
    """Eight groups, or fewer with ``::`` for at least one that is left out."""
    options = [rf"{_GROUP}(?::{_GROUP}){{7}}"]
    for before in range(8):
        head = rf"{_GROUP}(?::{_GROUP}){{{before - 1}}}" if before else ""
        behind = 7 - before
        tail = rf"(?:{_GROUP}(?::{_GROUP}){{0,{behind - 1}}})?" if behind else ""
        options.append(f"{head}::{tail}")
    return "|".join(options)


_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*://{_HOST}(?::[1-9]\d{{0,3}})?(?:/{_PATH})?(?:\?{_QUERY})?(?:#{_QUERY})?"
_RELATIVE = rf"(?:{_URI}|/?[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*(?:\?{_QUERY})?(?:#{_QUERY})?)"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM})*@{_NAME}(?:\.{_NAME})+"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "email": _EMAIL,
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "idn-email": _EMAIL,
    "idn-hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": _ipv6(),
    "iri": _URI,
    "iri-reference": _RELATIVE,
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9]\d*)(?:#|{_POINTER})",
    "uri": _URI,
    "uri-reference": _RELATIVE,
    "uri-template": _URI,
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
}

UNSUPPORTED = {"regex"}
"""Formats of the standard that no automaton can follow; what is in neither says nothing."""
