"""A server under a mix of valid and invalid requests: latency, failures and memory growth.

    python benchmarks/soak.py [--requests N] [--new-schemas N] [--clients N] [--checkpoint DIR]
        [--url URL] [--seed N] [--quick] [--json FILE]

Clients send what `_clients.py` draws, some at once, to a server of `examples/tiny-diffusiongemma`
that this program starts, or to ``--url``. Meanwhile `/health` is asked for twenty times a second.

    sorts     by sort of request: how many, their statuses, median and worst seconds
    wrong     statuses that are not right, constraints that a complete answer broke, connections
              that were dropped; each is printed
    health    seconds that `/health` took: median, 99th percentile, worst
    memory    MiB of the server's processes, what they share counted once, at each tenth of the
              requests: all, API server, engine, worker, what compiles

Exit status 1 if something is wrong or `/health` took longer than ``--health`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import httpx
from _clients import MODEL, Request, requests
from _report import Value, finish, parser, print_table

from vllm_diffusion.testing.server import serve

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

_OPTIONS = (
    *("--served-model-name", MODEL, "--max-model-len", "2048", "--kv-cache-memory-bytes", "256M"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "gemma4"),
    # Else vLLM keeps up to 4 GB of images, and nobody could tell that from a leak.
    *("--mm-processor-cache-gb", "0"),
)

_PROCESSES = (("EngineCore", "engine"), ("Worker", "worker"), ("compile_process", "compiling"))
"""What the command line of a process has, and what it is called here."""


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[Counter[str]] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, request: Request, seen: Seen) -> None:
    """Send one request and judge what comes back."""
    begin = time.monotonic()
    status, text = "left", ""
    body = json.dumps(request.body).encode()
    headers = {"content-type": "application/json"}
    try:
        async with asyncio.timeout(request.leaves_after):
            answer = await client.post(request.path, content=body, headers=headers)
            status, text = str(answer.status_code), answer.text
    except TimeoutError:
        pass
    except httpx.HTTPError as error:
        status = type(error).__name__
    seen.seconds[request.sort].append(time.monotonic() - begin)
    seen.statuses[request.sort][status] += 1
    if status == "left":
        return
    if not status.isdigit() or int(status) not in request.right:
        seen.wrong.append(f"{request.sort}: {status} {text[:300]} for {str(request.body)[:300]}")
    elif status == "200" and request.accepts is not None:
        choice = json.loads(text)["choices"][0]
        if choice["finish_reason"] == "stop" and not request.accepts(choice["message"]["content"]):
            seen.wrong.append(f"{request.sort}: broken by {choice['message']['content'][:300]!r}")


async def soak(url: str, drawn: list[Request], clients: int, processes: int | None) -> Seen:
    """Send all requests, ``clients`` at once."""
    seen, left, total = Seen(), iter(drawn), len(drawn)
    limits = httpx.Limits(max_connections=clients + 2)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        sent = 0

        async def send(request_of: Iterator[Request]) -> None:
            nonlocal sent
            for request in request_of:
                await ask(client, request, seen)
                sent += 1
                if processes is not None and sent % max(total // 10, 1) == 0:
                    seen.memory.append(_memory(processes))
                    print(f"{sent} of {total}: {_told(seen.memory[-1])} MiB", file=sys.stderr)

        beside = asyncio.create_task(_watch(url, seen))
        await asyncio.gather(*(send(left) for _ in range(clients)))
        beside.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beside
    return seen


async def _watch(url: str, seen: Seen) -> None:
    """Ask for `/health` twenty times a second, whatever became of the last one."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def once() -> None:
            begin = time.monotonic()
            status = (await client.get("/health")).status_code
            seen.health.append(time.monotonic() - begin)
            if status != httpx.codes.OK:
                seen.wrong.append(f"/health: {status}")

        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(once())
                await asyncio.sleep(0.05)


def _memory(session: int) -> Counter[str]:
    """MiB that the processes of a session hold, what they share counted once."""
    total: Counter[str] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                command = (folder / "cmdline").read_text()
                name = next((kind for mark, kind in _PROCESSES if mark in command), "API server")
                rollup = (folder / "smaps_rollup").read_text()
                held = next(int(x.split()[1]) for x in rollup.splitlines() if x[:4] == "Pss:")
                total[name] += held / 1024
    return total


def _told(memory: Counter[str]) -> str:
    parts = ", ".join(f"{name} {held:.0f}" for name, held in sorted(memory.items()))
    return f"{memory.total():.0f} ({parts})"


def main() -> int:
    """Run it."""
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=2000, metavar="N")
    arguments.add_argument("--new-schemas", type=int, default=200, metavar="N")
    arguments.add_argument("--clients", type=int, default=12, metavar="N")
    arguments.add_argument("--health", type=float, default=0.5, metavar="SECONDS")
    arguments.add_argument("--checkpoint", default="examples/tiny-diffusiongemma", metavar="DIR")
    arguments.add_argument("--url", help="of a running server")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    number, new = (120, 12) if options.quick else (options.requests, options.new_schemas)
    drawn = [*requests(random.Random(options.seed), number, new)]
    begin = time.monotonic()
    if options.url:
        seen = asyncio.run(soak(options.url, drawn, options.clients, None))
    else:
        with serve(options.checkpoint, *_OPTIONS, ready_within=300) as server:
            seen = asyncio.run(soak(server.url, drawn, options.clients, server.process.pid))
    for each in seen.wrong:
        print(each, file=sys.stderr)
    return _report(seen, options, number, time.monotonic() - begin)


def _report(seen: Seen, options: Namespace, number: int, seconds: float) -> int:
    rows: list[dict[str, Value]] = [
        {
            "sort": sort,
            "n": len(times),
            "statuses": ", ".join(
                f"{status} x {n}" for status, n in sorted(seen.statuses[sort].items())
            ),
            "median s": round(median(times), 2),
            "worst s": round(max(times), 2),
        }
        for sort, times in sorted(seen.seconds.items())
    ]
    print_table(rows)
    health = sorted(seen.health)
    results: dict[str, Value] = {
        "requests": number,
        "seconds": round(seconds, 1),
        "wrong": len(seen.wrong),
        "health median s": round(median(health), 4),
        "health 99 % s": round(health[len(health) * 99 // 100], 3),
        "health worst s": round(health[-1], 3),
        "memory MiB": " ".join(f"{each.total():.0f}" for each in seen.memory),
    }
    for row in rows:
        results |= {f"{row['sort']} {name}": value for name, value in row.items() if name != "sort"}
    headline = (
        f"{number} requests in {seconds:.0f} s, {len(seen.wrong)} wrong; /health "
        f"{health[-1]:.3f} s at worst; memory {results['memory MiB']} MiB"
    )
    finish(results, headline, options.json)
    return int(bool(seen.wrong) or health[-1] > options.health)


if __name__ == "__main__":
    raise SystemExit(main())
