"""Why an engine did not start, in one sentence, with options that may help.

An engine runs in processes of its own. The error raised in this process then only says that another
failed; the reason is in the log.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# The last line of a Python traceback, after vLLM's log prefix or at the start of a line.
_RAISED: Final = re.compile(
    r"(?:^|\] )(?:\w+\.)*\w*(?:Error|Exception|Exit): (?P<text>\S.*)$", re.MULTILINE
)
_ELSEWHERE: Final = "root cause"  # vLLM's errors about another process contain this
_MEMORY: Final = re.compile(
    r"memory on (?:node|device).*?\((?P<free>[\d.]+)/(?P<all>[\d.]+) GiB\).*is less than",
    re.IGNORECASE | re.DOTALL,
)
_CACHE_BYTES: Final = 1 << 30
_SLACK: Final = 0.9  # share of the free memory to ask for
_OPTION: Final = re.compile(
    r"(?:gpu[-_]memory[-_]utilization|kv[-_]cache[-_]memory[-_]bytes|max[-_]model[-_]len"
    r"|max[-_]num[-_]batched[-_]tokens|max[-_]num[-_]seqs)"
)


def reason(error: Exception, log: str) -> str:
    """Why the engine did not start, on one line.

    Args:
        error: the error raised in this process.
        log: the engine's log so far, empty if it was shown instead.
    """
    if hasattr(error, "errors"):  # pydantic's, which prints its own words around the reason
        return _one_line("; ".join(each["msg"] for each in error.errors()))
    told = str(error) or type(error).__name__
    if _ELSEWHERE in told:
        causes = [match["text"] for match in _RAISED.finditer(log)]
        told = next((text for text in reversed(causes) if _ELSEWHERE not in text), told)
    return _one_line(told)


def way_out(told: str, engine: Mapping[str, Any]) -> str:
    """How to pass the engine options that a reason names to this command; empty if it names none.

    Args:
        told: the reason; vLLM names the options of its own command.
        engine: the current options, which are kept.
    """
    if memory := _MEMORY.search(told):
        share = max(int(100 * _SLACK * float(memory["free"]) / float(memory["all"])) / 100, 0.01)
        size = _option(engine, "kv_cache_memory_bytes", _CACHE_BYTES)
        fitting = _option(engine, "gpu_memory_utilization", share)
        return f"Use only the free memory, {fitting}, or set the cache size in bytes, {size}."
    named = dict.fromkeys(name.replace("-", "_") for name in _OPTION.findall(told))
    return f"With this command: {_option(engine, next(iter(named)), 'N')}." if named else ""


def _option(engine: Mapping[str, Any], name: str, value: object) -> str:
    return f"--engine '{json.dumps({**engine, name: value})}'"


def _one_line(text: str) -> str:
    return " ".join(text.split())
