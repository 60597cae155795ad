"""Running `vllm serve` as a subprocess: what it prints is kept, what it starts is ended."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from vllm_diffusion.testing import server

# Stands in for `vllm`: answers the health check, leaves a child behind, prints its arguments.
FAKE = """#!{python}
import http.server, subprocess, sys
print("started", sys.argv[1:], flush=True)
if "--fail" in sys.argv:
    sys.exit(3)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--unwell" in sys.argv else 200)
        self.end_headers()
        self.wfile.write(b'# HELP n\\nn_total{{engine="0"}} 2.0\\nn_total{{engine="1"}} 3.0\\n')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)\\
    .serve_forever()
"""


@pytest.fixture(autouse=True)
def _fake_vllm(tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(server.sys, "executable", str(tmp_path / "python"))


def child_of(running: server.Server) -> int:
    return int(running.log().partition("child ")[2].split()[0])


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False


def test_yields_when_healthy_and_ends_every_process():
    with server.serve("model", "--seed", "1") as running:
        assert "'serve', 'model', '--host', '127.0.0.1'" in running.log(1 << 20)
        assert running.metrics() == {"n": 5.0}
        child = child_of(running)
        assert is_alive(child)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    assert running.process.poll() is not None
    assert not running.log_file.exists()


def test_ends_every_process_when_the_block_fails():
    with pytest.raises(KeyboardInterrupt), server.serve("model") as running:
        raise KeyboardInterrupt
    assert running.process.poll() is not None


def test_a_server_that_dies_shows_its_log():
    with (
        pytest.raises(server.ServerError, match=r"ended with status 3:\nstarted"),
        server.serve("model", "--fail"),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up():
    with (
        pytest.raises(server.ServerError, match=r"not ready within 1 s:\nstarted"),
        server.serve("model", "--unwell", ready_within=1),
    ):
        pass


def test_environment_is_added_to_ours(monkeypatch):
    seen = {}
    popen = server.subprocess.Popen

    def spy(*arguments, **options):
        seen.update(options["env"])
        return popen(*arguments, **options)

    monkeypatch.setattr(server.subprocess, "Popen", spy)
    with server.serve("model", environment={"VLLM_DIFFUSION": "0"}):
        pass
    assert seen["VLLM_DIFFUSION"] == "0"
    assert seen["PATH"] == os.environ["PATH"]


def test_metrics_are_summed_over_labels():
    page = '# TYPE x counter\nx_total{a="1"} 1\nx_total{a="2"} 2.5\ny 4e3\nz_sum{le="+Inf"} 1\n'
    assert server.parse_metrics(page) == {"x": 3.5, "y": 4000.0, "z_sum": 1.0}
