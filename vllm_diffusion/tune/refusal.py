"""Why an engine did not start, in one sentence, with what to give the command instead.

An engine runs in processes of its own. What this one raises then says that another failed; the
reason stands in the log alone.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# How Python ends a traceback, behind vLLM's own prefix or at the start of a line.
_RAISED: Final = re.compile(
    r"(?:^|\] )(?:\w+\.)*\w*(?:Error|Exception|Exit): (?P<text>\S.*)$", re.MULTILINE
)
_ELSEWHERE: Final = "root cause"  # in what vLLM raises about another process
_MEMORY: Final = re.compile(
    r"memory on (?:node|device).*?\((?P<free>[\d.]+)/(?P<all>[\d.]+) GiB\).*is less than",
    re.IGNORECASE | re.DOTALL,
)
_CACHE_BYTES: Final = 1 << 30
_SLACK: Final = 0.9  # of what is free, since others want memory too
_OPTION: Final = re.compile(
    r"(?:gpu[-_]memory[-_]utilization|kv[-_]cache[-_]memory[-_]bytes|max[-_]model[-_]len"
    r"|max[-_]num[-_]batched[-_]tokens|max[-_]num[-_]seqs)"
)


def reason(error: Exception, log: str) -> str:
    """What kept the engine from starting, on one line.

    Args:
        error: what was raised in this process.
        log: of the engine so far, empty where it was shown.
    """
    if hasattr(error, "errors"):  # pydantic's, which prints its own words around the reason
        return _one_line("; ".join(each["msg"] for each in error.errors()))
    told = str(error) or type(error).__name__
    if _ELSEWHERE in told:
        causes = [match["text"] for match in _RAISED.finditer(log)]
        told = next((text for text in reversed(causes) if _ELSEWHERE not in text), told)
    return _one_line(told)


def way_out(told: str, engine: Mapping[str, Any]) -> str:
    """How this command is given the engine options that a reason is about; empty if it names none.

    Args:
        told: the reason; vLLM names options as those of its own command.
        engine: the options so far, which stay.
    """
    if memory := _MEMORY.search(told):
        share = max(int(100 * _SLACK * float(memory["free"]) / float(memory["all"])) / 100, 0.01)
        size = _option(engine, "kv_cache_memory_bytes", _CACHE_BYTES)
        fitting = _option(engine, "gpu_memory_utilization", share)
        return f"Ask for what is free, {fitting}, or give the cache its size in bytes, {size}."
    named = dict.fromkeys(name.replace("-", "_") for name in _OPTION.findall(told))
    return f"Here that is {_option(engine, next(iter(named)), 'N')}." if named else ""


def _option(engine: Mapping[str, Any], name: str, value: object) -> str:
    return f"--engine '{json.dumps({**engine, name: value})}'"


def _one_line(text: str) -> str:
    return " ".join(text.split())
