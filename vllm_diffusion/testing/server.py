"""`vllm serve` as a subprocess that cannot outlive the block that started it.

Takes a checkpoint and options of `vllm serve`. Gives a base URL, the log and the metrics of a
server that is ready. Never imports vLLM: the server is a process of its own, as users run it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

READY_WITHIN = 180.0
"""Seconds a server may take until it answers; a tiny checkpoint on two cores takes about 30."""

STOP_WITHIN = 15.0
"""Seconds between asking the server to stop and killing all of its processes."""


class ServerError(RuntimeError):
    """The server stopped, or was not ready in time; the message ends with the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answered its health check."""

    url: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def log(self, lines: int | None = None) -> str:
        """Return what the server printed, or its last `lines` lines."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(text if lines is None else text[-lines:])

    def metrics(self) -> dict[str, float]:
        """Read `/metrics`: every counter and gauge by name, summed over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:  # noqa: S310
            return parse_metrics(answer.read().decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Sum the samples of a Prometheus text page by name; a counter loses its `_total`."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            labelled, _, value = line.rpartition(" ")
            name = labelled.partition("{")[0].removesuffix("_total")
            values[name] = values.get(name, 0.0) + float(value)
    return values


@contextlib.contextmanager
def serve(
    checkpoint: str | Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    ready_within: float = READY_WITHIN,
) -> Iterator[Server]:
    """Run `vllm serve CHECKPOINT OPTIONS` on a free port of this host until the block ends.

    `environment` is added to this process's. Raises `ServerError` if the server dies or does not
    answer within `ready_within` seconds. On the way out all of its processes are gone, whatever
    happened, and so is its log.
    """
    port = free_port()
    program = Path(sys.executable).with_name("vllm")
    command = [str(program), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="vllm-serve-") as folder:
        log_file = Path(folder, "server.log")
        with log_file.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 -- our own program and options
                [*command, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # one group for the API server, the engine and the workers
            )
        server = Server(url=f"http://127.0.0.1:{port}", log_file=log_file, process=process)
        try:
            _wait_until_ready(server, ready_within)
            yield server
        finally:
            _stop(process)


def free_port() -> int:
    """Return a port that nothing on this host listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not _is_healthy(server):
        if server.process.poll() is not None:
            status = server.process.returncode
            raise ServerError(f"vllm serve ended with status {status}:\n{server.log(60)}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve was not ready within {seconds:.0f} s:\n{server.log(60)}")
        time.sleep(0.2)


def _is_healthy(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)  # noqa: PLR2004 -- HTTP's own number
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: politely, then for certain."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WITHIN)
            # The leader is gone; an engine that ignored it may not be.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return
