"""The command line of `vllm-diffusion tune`, as far as it goes without an engine."""

from __future__ import annotations

import pytest

from vllm_diffusion.cli import main


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' * 5)
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arm", "slow"], "preset must be one of"),
        (["--arm", "reference", "--arm", "max_steps=0"], "max_steps must be a positive integer"),
        (["--verifier", "taste"], "there is no verifier 'taste'"),
        (["--search", "1", "--n", "3"], "--search uses half of the items"),
        (["--n", "0"], "at least 1"),
        (["--search", "-1"], "at least 0"),
        (["--max-tokens", "0"], "at least 1"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--task", "."], ". cannot be read"),
        (["--json", "."], "--json . cannot be written"),
        (["--json", "nowhere/figures.json"], "--json nowhere/figures.json cannot be written"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_an_engine_starts(task, arguments, said, capsys):
    assert main(["tune", "no-such-model", "--task", task, *arguments]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line


@pytest.mark.parametrize("engine", ["{", "[1]", "max_model_len=4096"])
def test_arguments_of_the_engine_are_an_object(task, engine, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "no-such-model", "--task", task, "--engine", engine])
    assert "is not a JSON object" in capsys.readouterr().err
