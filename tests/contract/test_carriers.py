"""What travels in vLLM's objects arrives as it left, and leaves what is not ours alone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.sampling import RULE, RULES
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_diffusion.engine import carriers
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.request.admitted import Admitted, admitted
from vllm_diffusion.request.options import read_options
from vllm_diffusion.request.parse import parse_params
from vllm_diffusion.telemetry import KEY, CanvasReport, Report

pytestmark = pytest.mark.vllm

OPTIONS: dict[str, Any] = {
    "diffusion_canvas_length": 3,
    "diffusion_max_steps": 5,
    "diffusion_read_only": True,
    "diffusion_seed_canvas": [4, 5, 6],
    "diffusion_pinned": [1],
    "diffusion_fused_commit": False,
}


def test_a_record_takes_the_place_of_the_options_but_for_those_that_vllm_reads() -> None:
    client = {**OPTIONS, "kv_transfer_params": {"a": 1}}
    sampling = SamplingParams(extra_args=client)
    record = admitted(read_options(client)[0], RULES)
    carriers.put_admitted(sampling, record)
    assert client == {**OPTIONS, "kv_transfer_params": {"a": 1}}
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(sampling))
    assert carriers.admitted(sent, RULE) == record
    assert sent.extra_args is not None
    assert sent.extra_args["kv_transfer_params"] == {"a": 1}
    kept = {name for name in sent.extra_args if name in OPTIONS}
    assert kept == {"diffusion_canvas_length", "diffusion_max_steps", "diffusion_read_only"}
    assert carriers.unread_options(sent) == []


def test_a_request_without_a_record_gets_what_is_served() -> None:
    assert carriers.admitted(SamplingParams(), RULE) == Admitted(rule=RULE)
    past = SamplingParams(extra_args=OPTIONS | {"other": 1})
    assert carriers.unread_options(past) == [
        "diffusion_seed_canvas",
        "diffusion_pinned",
        "diffusion_fused_commit",
    ]


@pytest.mark.parametrize("place", ["_ADMITTED", "_CONSTRAINT"])
def test_no_client_can_write_to_a_place_of_ours(place: str) -> None:
    name = vars(carriers)[place]
    with pytest.raises(ParamsError, match=f"unknown option {name!r}"):
        parse_params(SamplingParams(extra_args={name: {}}))


def test_a_constraint_reaches_the_worker_and_not_the_schedulers_own_copy() -> None:
    sampling = SamplingParams(extra_args={"other": 1})
    new = SimpleNamespace(sampling_params=sampling)
    assert carriers.named_constraint(new) is None
    carriers.put_named_constraint(new, "named")
    assert carriers.named_constraint(new) == "named"
    assert new.sampling_params.extra_args["other"] == 1
    assert sampling.extra_args == {"other": 1}


@pytest.mark.parametrize("others", [None, {"remote": 1}])
def test_a_report_is_taken_off_before_anyone_sees_it(others: dict[str, Any] | None) -> None:
    report = Report(
        asked=True,
        denoise_forwards=3,
        commit_forwards=1,
        rows=128,
        canvas=CanvasReport(steps=3, stopped_by="settled", entropy=0.5, tokens=32),
    )
    output = EngineCoreOutput("name", [1], kv_transfer_params=others)
    assert carriers.take_report(output) is None
    carriers.put_report(output, report)
    assert output.kv_transfer_params is not None
    assert json.dumps(output.kv_transfer_params[KEY])
    assert carriers.take_report(output) == report
    assert output.kv_transfer_params == others
