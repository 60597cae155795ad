"""What reaches a user's terminal of a run, and what its log."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vllm_diffusion.tune.screen import screen

if TYPE_CHECKING:
    from pathlib import Path

NOISE = "import os; os.write(1, b'noise'); os.write(2, b'noise')"


def test_only_the_run_speaks_and_everything_else_is_in_the_log(capfd):
    with screen(verbose=False) as shown:
        os.write(1, b"written")
        subprocess.run([sys.executable, "-c", NOISE], check=True)
        shown.say("a row")
        shown.note("a step")
        assert shown.log is not None
        log = shown.log.read_text()
    assert capfd.readouterr() == ("a row\n", "a step\n")
    assert log == "writtennoisenoise"
    assert not shown.log.exists()
    os.write(1, b"again")
    assert capfd.readouterr().out == "again"


def test_the_log_of_a_run_that_fails_stays(capfd):
    kept: list[Path] = []

    def fail() -> None:
        with screen(verbose=False) as shown:
            assert shown.log is not None
            kept.append(shown.log)
            os.write(2, b"the reason")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert kept[0].read_text() == "the reason"
    kept[0].unlink()
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"


def test_a_verbose_run_shows_it(capfd):
    with screen(verbose=True) as shown:
        os.write(1, b"noise\n")
        shown.note("a step")
        assert shown.log is None
    assert capfd.readouterr() == ("noise\n", "a step\n")


def test_a_bar_is_one_line_that_is_gone_once_it_is_full(capfd):
    pytest.importorskip("tqdm")
    with screen(verbose=False) as shown:
        # As vLLM calls it.
        bar = shown.bar("fast")(total=2, desc="Processed prompts", dynamic_ncols=True)
        bar.update(2)
        bar.close()
    out, err = capfd.readouterr()
    assert not out
    assert "fast:   0%" in err
    assert "Processed" not in err
    assert "\n" not in err
    assert not err.rpartition("\r")[2].strip()
