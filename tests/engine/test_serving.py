"""What serving asks of vLLM's configuration and makes of a user's options; no engine runs."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from helpers.engines import engine_config
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_diffusion.denoise.constants import EntropyBoundConstants
from vllm_diffusion.denoise.presets import PRESETS
from vllm_diffusion.engine import carriers, refusals, serving
from vllm_diffusion.engine.refusals import refuse_head, refuse_unbuilt
from vllm_diffusion.engine.scheduler import AsyncCanvasScheduler, CanvasScheduler, canvas_scheduler
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Conditioning, Family, Text
from vllm_diffusion.head import cuda
from vllm_diffusion.head.output_copy import HEAD_FORMS
from vllm_diffusion.quant import int8

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> VllmConfig:
    return engine_config(tiny_checkpoint)


def test_a_head_that_is_not_built_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_DIFFUSION_HEAD", "cuda")
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "cuda.py"))
    cuda.library.cache_clear()
    with pytest.raises(ValueError, match="CUDA form is not built"):
        engine_config(tiny_checkpoint)


# ---- what the head reads ----


def with_head(checkpoint: Path, form: str) -> VllmConfig:
    return engine_config(checkpoint, additional_config={"diffusion": {"head_weights": form}})


def test_the_head_reads_its_matrix_unless_asked(config: VllmConfig, tiny_checkpoint: Path):
    assert carriers.served(config.model_config.hf_config).head_weights is None
    for asked, form in (("exact", None), ("fp8", "fp8")):
        hf_config = with_head(tiny_checkpoint, asked).model_config.hf_config
        assert carriers.served(hf_config).head_weights == form


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, *, cuda: bool = True) -> None:
    platform = serving.current_platform
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(platform, "is_cuda", lambda: cuda)
    monkeypatch.setattr(platform, "has_device_capability", lambda least: capability >= least)


@pytest.mark.parametrize("form", sorted({*HEAD_FORMS} - {"fp8"}))
def test_forms_of_the_head_but_fp8_are_for_cpu_hosts(monkeypatch: pytest.MonkeyPatch, form: str):
    on_a_gpu(monkeypatch, 90)
    with pytest.raises(ConfigError, match=f"head_weights={form} is not supported on a GPU"):
        refuse_head(form, 64, 640, torch.bfloat16)


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_a_head_in_fp8_is_for_gpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capability: int
):
    on_a_gpu(monkeypatch, capability)
    refuse_head("fp8", 2816, 262144, torch.bfloat16)
    for inputs, ids, dtype in (
        (40, 640, torch.bfloat16),
        (64, 644, torch.bfloat16),
        (64, 640, torch.float16),
    ):
        with pytest.raises(ConfigError, match=f"for {ids} ids of {inputs} inputs in {dtype}"):
            refuse_head("fp8", inputs, ids, dtype)


@pytest.mark.parametrize(("capability", "cuda"), [(80, True), (90, False)])
def test_other_gpus_refuse_it(monkeypatch: pytest.MonkeyPatch, capability: int, cuda: bool):
    on_a_gpu(monkeypatch, capability, cuda=cuda)
    with pytest.raises(ConfigError, match="head_weights=fp8 is not supported on this GPU"):
        refuse_head("fp8", 64, 640, torch.bfloat16)


def test_a_form_that_this_processor_or_model_cannot_have_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "is_exact", lambda: False)
    with pytest.raises(ValueError, match="whose int8 sums overflow"):
        with_head(tiny_checkpoint, "int8")
    with pytest.raises(ConfigError, match="40 inputs, which is not a multiple of 16"):
        refuse_head("nvfp4", 40, 640, torch.bfloat16)


def test_an_attention_that_this_host_has_not_is_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="TRITON_ATTN is not available on a CPU host"):
        engine_config(tiny_checkpoint, attention_backend="TRITON_ATTN")
    engine_config(tiny_checkpoint, attention_backend="CPU_ATTN")


# ---- attention on GPUs ----


@pytest.mark.parametrize(
    ("family", "version", "longest", "chosen"),
    [
        (90, 4, 512, None),
        (100, 4, 512, AttentionBackendEnum.TRITON_ATTN),
        (100, 4, 32, None),  # no longer than the window, which then hides nothing
        (90, None, 512, AttentionBackendEnum.TRITON_ATTN),  # an FP8 cache: version 3 where it can
    ],
)
def test_a_gpu_whose_own_choice_takes_no_ranges_gets_triton(
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    family: int,
    version: int | None,
    longest: int,
    chosen: AttentionBackendEnum | None,
):
    platform = type(serving.current_platform)
    monkeypatch.setattr(serving.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(platform, "is_device_capability_family", lambda *of: of[-1] == family)
    on_gpu = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=longest, get_sliding_window=config.model_config.get_sliding_window
        ),
        attention_config=SimpleNamespace(backend=None, flash_attn_version=version),
    )
    serving.choose_attention_of_ranges(on_gpu)
    assert on_gpu.attention_config.backend is chosen


def test_a_config_that_says_nothing_of_a_window_has_none(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
):
    """As LLaDA's."""
    monkeypatch.setattr(serving.current_platform, "is_cpu", lambda: False)
    model, attention = copy.copy(config.model_config), SimpleNamespace(backend=None)
    model.hf_text_config = SimpleNamespace()
    serving.choose_attention_of_ranges(
        SimpleNamespace(model_config=model, attention_config=attention)
    )
    assert attention.backend is None


# ---- scheduling ----


@pytest.fixture
def warnings_of_serving(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `engine.serving` warns of, whatever levels and handlers vLLM gives its loggers."""
    messages: list[str] = []
    for module in (serving, refusals):
        monkeypatch.setattr(module.logger, "warning", lambda text, *of: messages.append(text % of))
    return messages


def test_a_budget_below_one_canvas_is_refused_with_the_way_out(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="max_num_batched_tokens is 31") as caught:
        engine_config(tiny_checkpoint, max_num_batched_tokens=31, max_num_seqs=1)
    assert "at least one canvas of 32 tokens" in str(caught.value)
    assert "raise it to 32 or more" in str(caught.value)


def test_a_budget_of_one_canvas_is_served(tiny_checkpoint: Path):
    config = engine_config(tiny_checkpoint, max_num_batched_tokens=32, max_num_seqs=1)
    assert config.scheduler_config.max_num_batched_tokens == 32


def test_a_step_limit_below_one_canvas_is_refused_too(tiny_checkpoint: Path):
    # The scheduler obeys it instead of max_num_batched_tokens: no canvas would ever run.
    with pytest.raises(ValueError, match="max_num_scheduled_tokens is 31"):
        engine_config(tiny_checkpoint, max_num_batched_tokens=64, max_num_scheduled_tokens=31)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU hosts")
def test_data_parallel_engines_are_refused_on_a_cpu(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="Start as many servers instead"):
        engine_config(tiny_checkpoint, data_parallel_size=2)


def test_nothing_of_vllm_exchanges_the_rows_of_experts_on_a_cpu():
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    assert "all_gatherv" not in vars(CpuCommunicator), "the refusal can go"


def test_long_prefill_token_threshold_is_switched_off_with_a_warning(
    tiny_checkpoint: Path, warnings_of_serving: list[str]
):
    config = engine_config(tiny_checkpoint, long_prefill_token_threshold=20)
    assert config.scheduler_config.long_prefill_token_threshold == 0
    (warning,) = warnings_of_serving
    assert "long_prefill_token_threshold=20" in warning
    assert "clip canvases" in warning


def test_a_scheduler_named_by_the_user_stays_with_a_warning(
    tiny_checkpoint: Path, warnings_of_serving: list[str]
):
    stock = "vllm.v1.core.sched.diffusion_scheduler.DiffusionScheduler"
    config = engine_config(tiny_checkpoint, scheduler_cls=stock)
    assert config.scheduler_config.scheduler_cls == stock
    (warning,) = warnings_of_serving
    assert stock in warning
    assert "WholeCanvasMixin" in warning


def test_an_override_that_no_rule_reads_is_told(
    tiny_checkpoint: Path, warnings_of_serving: list[str]
):
    """The recipe's command line; vLLM reads it neither."""
    overrides = {"diffusion_sampler": "entropy_bound", "diffusion_entropy_bound": 0.3}
    config = engine_config(tiny_checkpoint, hf_overrides=overrides)
    rules = carriers.served(config.model_config.hf_config).rules
    assert rules.default.entropy_bound == 0.1
    (warning,) = warnings_of_serving
    assert "diffusion_sampler, diffusion_entropy_bound in --hf-overrides" in warning
    assert "--additional-config" in warning


def test_without_its_processors_files_a_checkpoint_serves_text_alone(
    tiny_checkpoint: Path, tmp_path: Path, warnings_of_serving: list[str]
):
    options: dict[str, Any] = {"limit_mm_per_prompt": {}}
    assert engine_config(tiny_checkpoint, **options).model_config.supports_multimodal_inputs
    assert not warnings_of_serving
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()
    config = engine_config(tmp_path, **options)
    assert not config.model_config.supports_multimodal_inputs
    (warning,) = warnings_of_serving
    assert f"{tmp_path} serves only text, and requests with images or video are" in warning
    assert "\n" not in warning


def test_a_plain_configuration_warns_of_nothing(
    tiny_checkpoint: Path, warnings_of_serving: list[str]
):
    config = engine_config(tiny_checkpoint)
    assert config.scheduler_config.scheduler_cls == serving.SCHEDULER
    assert not warnings_of_serving


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({"max_num_batched_tokens": 2048}, 64),
        ({"max_num_batched_tokens": 100}, 3),
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 5}, 5),
        ({"max_num_batched_tokens": 40, "max_num_seqs": 20}, 20),
    ],
)
def test_requests_at_once_are_as_many_as_fit_a_step_unless_asked_for_less(
    tiny_checkpoint: Path, options: dict[str, int], served: int
):
    config = engine_config(tiny_checkpoint, **options)
    assert config.scheduler_config.max_num_seqs == served


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_scheduler_follows_async_scheduling(config: VllmConfig, asynchronous: bool):
    changed = copy.copy(config)
    changed.scheduler_config = copy.copy(config.scheduler_config)
    changed.scheduler_config.async_scheduling = asynchronous
    expected = AsyncCanvasScheduler if asynchronous else CanvasScheduler
    with patch.object(expected, "__init__", return_value=None) as made:
        assert type(canvas_scheduler(changed, log_stats=True)) is expected
    made.assert_called_once_with(vllm_config=changed, log_stats=True)


# ---- options of the rule ----


@pytest.fixture
def said_by_serving(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of `engine.serving` about what is served."""
    messages: list[str] = []
    monkeypatch.setattr(serving.logger, "info", lambda text, *of: messages.append(text % of))
    return messages


def parsed(*arguments: str) -> VllmConfig:
    """The configuration of `vllm serve` with these arguments."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    common = ("--max-model-len", "512", "--enforce-eager")
    return EngineArgs.from_cli_args(parser.parse_args([*arguments, *common])).create_engine_config()


def test_the_options_of_vllm_serve_reach_the_rule_and_the_log_says_so(
    tiny_checkpoint: Path, said_by_serving: list[str]
):
    config = parsed(
        "--model",
        str(tiny_checkpoint),
        "--additional-config",
        '{"diffusion": {"preset": "balanced", "stability_threshold": 2, "head_memory_mb": 64}, '
        '"of_another_plugin": 1}',
        "--diffusion-config",
        '{"max_denoising_steps": 24}',
        "--override-generation-config",
        '{"t_max": 0.9, "sampler_config": {"entropy_bound": 0.7}}',
    )
    rules = carriers.served(config.model_config.hf_config).rules
    published = EntropyBoundConstants(
        max_steps=24,
        t_min=0.4,
        t_max=0.9,
        entropy_bound=0.7,
        confidence_threshold=0.005,
        stability_threshold=1,
    )
    assert rules.presets["reference"] == published
    assert rules.default == replace(
        published, **PRESETS["entropy_bound"]["balanced"], stability_threshold=2
    )
    (line,) = said_by_serving
    assert "max_steps=24 (diffusion_config), t_min=0.4, t_max=0.9 (override_gen" in line
    for name in PRESETS["entropy_bound"]["balanced"]:
        assert f"{name}={getattr(rules.default, name)} (preset balanced)" in line
    assert "stability_threshold=2 (additional_config)" in line
    assert carriers.served(config.model_config.hf_config).head_memory_mb == 64
    assert "logits of a step take at most 64 MB" in line
    assert f"at most {config.scheduler_config.max_num_seqs} at once" in line


def test_a_plain_configuration_serves_the_checkpoints_rule(
    config: VllmConfig, tiny_checkpoint: Path, said_by_serving: list[str]
):
    rules = carriers.served(config.model_config.hf_config).rules
    assert rules.default == rules.presets["reference"]
    engine_config(tiny_checkpoint)
    (line,) = said_by_serving
    assert "t_max=0.8, entropy_bound=0.1, confidence_threshold=0.005" in line
    assert "_config)" not in line


def test_a_diffusion_config_may_leave_the_width_to_the_checkpoint(tiny_checkpoint: Path):
    config = engine_config(tiny_checkpoint, diffusion_config={"max_denoising_steps": 24})
    assert config.diffusion_config.canvas_length == 32
    assert config.num_speculative_tokens == 32
    assert config.model_config.hf_config.canvas_length == 32
    assert carriers.served(config.model_config.hf_config).canvas_length == 32


def test_options_that_make_no_sense_are_refused_in_one_message(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="options cannot be served") as caught:
        engine_config(
            tiny_checkpoint,
            additional_config={"diffusion": {"preset": "quick", "steps": 4, "t_min": 0.95}},
            override_generation_config={"max_steps": 4},
        )
    for problem in ("got 'quick'", "has no 'steps'", "t_max (0.8) must not be below", "max_steps"):
        assert problem in str(caught.value)


def test_a_step_limit_of_zero_is_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="max_denoising_steps must be a positive integer, got 0"):
        engine_config(tiny_checkpoint, diffusion_config={"max_denoising_steps": 0})


# ---- sampling parameters that an author recommends ----


@pytest.fixture(scope="module")
def recommending(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose generation config names sampling parameters too."""
    copied = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("author") / "checkpoint")
    file = copied / "generation_config.json"
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "do_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | wanted))
    return copied


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.5, 0.9, 7)),
        ({"override_generation_config": {"temperature": 0.2}}, (0.2, 0.9, 7)),
        ({"generation_config": "vllm"}, (1.0, 1.0, 0)),
    ],
    ids=["auto", "overridden", "vllm"],
)
def test_an_authors_sampling_parameters_are_a_chats_defaults(
    recommending: Path, options: dict[str, Any], expected: tuple[float, float, int]
):
    config = engine_config(recommending, **options).model_config
    # The rule's constants are the checkpoint's whatever the defaults of sampling are.
    assert carriers.served(config.hf_config).rules.default.t_max == 0.8
    defaults = config.get_diff_sampling_param()
    assert "max_tokens" not in defaults, "the checkpoint's 256 would cut every answer"
    plain = ChatCompletionRequest(messages=[{"role": "user", "content": "hello"}])
    sampling = plain.to_sampling_params(64, defaults)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected
    asked = ChatCompletionRequest(messages=plain.messages, temperature=0.9, top_p=1, top_k=0)
    sampling = asked.to_sampling_params(64, defaults)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.9, 1.0, 0)


def test_a_family_that_declares_what_is_not_built_is_refused_by_name():
    plain = Family(name="some", rule="entropy_bound", conditioning=Conditioning.SELF)
    refuse_unbuilt(plain)
    refuse_unbuilt(replace(plain, mask_id=7, text=Text.BLOCK, block=4, banned=(7,)))
    for name, value in {"reads": -1, "seeded": True, "edits": True}.items():
        with pytest.raises(ConfigError, match=f"the family some declares {name}"):
            refuse_unbuilt(replace(plain, **{name: value}))
    with pytest.raises(ConfigError, match="conditioning=time"):
        refuse_unbuilt(replace(plain, conditioning=Conditioning.TIME))
