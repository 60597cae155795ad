"""What cannot be served is refused with one clear error, and nothing is left behind."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_diffusion.denoise.constants import CONSTANTS
from vllm_diffusion.engine import refusals
from vllm_diffusion.errors import CheckpointError, UnsupportedRunnerError
from vllm_diffusion.request import options, parse
from vllm_diffusion.request.text import TEXTS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS = 32
MAX_MODEL_LEN = 512

# ---- requests ----


@pytest.fixture
def llm(engine: Callable[..., LLM]) -> Iterator[LLM]:
    """The engine; after the test it serves as before it, and holds nothing."""
    llm = engine()
    before = answer(llm)
    yield llm
    assert answer(llm) == before
    Inside(llm).assert_idle()


def answer(llm: LLM) -> list[int]:
    sampling = SamplingParams(max_tokens=CANVAS, ignore_eos=True, seed=3)
    return list(llm.generate("hello", sampling, use_tqdm=False)[0].outputs[0].token_ids)


def refusal(llm: LLM, prompt: Any = "hello", **sampling: Any) -> str:
    """What the client is told; VLLMValidationError is what the server answers with status 400."""
    with pytest.raises(VLLMValidationError) as caught:
        llm.generate(prompt, SamplingParams(**sampling), use_tqdm=False)
    return str(caught.value)


def test_input_that_comes_piece_by_piece(llm: LLM) -> None:
    async def pieces() -> AsyncGenerator[StreamingInput, None]:
        yield StreamingInput({"type": "token", "prompt_token_ids": [20, 21]})

    engine = SimpleNamespace(
        model_config=llm.llm_engine.model_config, input_processor=llm.input_processor
    )
    with pytest.raises(VLLMValidationError, match="piece by piece"):
        AsyncLLM.generate(engine, pieces(), SamplingParams(), "1")
    # A whole prompt passes the check: what comes back is the answer, not yet asked for.
    assert inspect.isasyncgen(AsyncLLM.generate(engine, "hello", SamplingParams(), "1"))


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": []}], ids=["text", "tokens"])
def test_an_empty_prompt(llm: LLM, prompt: object):
    assert "cannot be empty" in refusal(llm, prompt)


@pytest.mark.parametrize("length", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 5000])
def test_a_prompt_that_leaves_no_room(llm: LLM, length: int):
    message = refusal(llm, {"prompt_token_ids": [300] * length})
    assert str(MAX_MODEL_LEN) in message
    assert str(length) in message


@pytest.mark.parametrize("token", [512, 10**6, -1])
def test_a_token_outside_the_vocabulary(llm: LLM, token: int):
    assert str(token) in refusal(llm, {"prompt_token_ids": [300, token]})


def test_everything_that_is_wrong_with_a_request_in_one_message(llm: LLM):
    message = refusal(
        llm,
        thinking_token_budget=3,
        min_tokens=3,
        stop_token_ids=[5],
        allowed_token_ids=[5],
        logit_bias={5: float("inf")},
        structured_outputs=StructuredOutputsParams(regex="a{100}"),
        extra_args={"diffusion_max_steps": "12", "diffusion_canvas": 8, "diffusion_t_min": 9.0},
    )
    for problem in (
        "thinking_token_budget=3",
        "min_tokens=3 forbids every one of the allowed_token_ids",
        "logit_bias must be finite, up to 1e+06, got {5: inf}",
        "No text of the constraint can be written with allowed_token_ids",
        "diffusion_max_steps must be a positive integer, got '12'",
        "unknown option 'diffusion_canvas'",
        "accepted: diffusion_preset, diffusion_canvas_length, diffusion_max_steps, ",
        "must not be below diffusion_t_min (9.0)",
    ):
        assert problem in message


def test_options_are_held_against_what_is_served(llm: LLM):
    extra = {
        "diffusion_seed_canvas": [512] * (CANVAS - 1),
        "diffusion_pinned": [CANVAS],
        "diffusion_stability_threshold": 2,
    }
    message = refusal(llm, max_tokens=100, extra_args=extra)
    assert f"exactly {CANVAS} ids, got {CANVAS - 1}" in message
    assert "below 512, got 512" in message
    assert f"inside the canvas of {CANVAS - 1}, got {CANVAS}" in message
    assert "at most the served 1, got 2" in message


@pytest.mark.parametrize("steps", [2**63, 2**64 - 1])
def test_a_step_count_no_tensor_can_hold(llm: LLM, steps: int):
    assert "at most" in refusal(llm, extra_args={"diffusion_max_steps": steps})


def test_beam_search_is_served_token_by_token(llm: LLM):
    # vLLM writes a beam as requests of one token each, with logprobs: slow here, and well defined.
    (output,) = llm.beam_search(["hello"], BeamSearchParams(beam_width=2, max_tokens=2))
    assert len(output.sequences) == 2
    best, second = output.sequences
    assert best.cum_logprob >= second.cum_logprob


def test_one_bad_request_of_a_batch_takes_the_batch_and_nothing_else(llm: LLM):
    good, bad = SamplingParams(max_tokens=64), SamplingParams(logit_bias={1: float("nan")})
    with pytest.raises(VLLMValidationError, match="logit_bias"):
        llm.generate(["a", "b", "c"], [good, bad, good], use_tqdm=False)


def test_every_sampling_parameter_is_honoured_or_refused():
    # Fails when vLLM gains one: honour it, or refuse it in `parse.UNSUPPORTED`.
    honoured = {
        "temperature", "top_p", "top_k", "min_p", "min_tokens", "logit_bias", "bad_words",
        "allowed_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "logprobs", "logprob_token_ids", "prompt_logprobs", "prompt_logprob_token_ids",
        "n", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "detokenize",
        "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
        "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "extra_args",
        "skip_reading_prefix_cache", "repetition_detection", "structured_outputs",
    }  # fmt: skip
    # Only say something about another one, or about an engine option that is refused at start.
    companions = {
        "flat_logprobs",
        "prompt_logprob_start",
        "routed_experts_prompt_start",
        "watermarking",
    }
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public == honoured | companions | set(parse.UNSUPPORTED)


def test_defaults_of_vllm_are_not_refused():
    assert parse.parse_params(SamplingParams()) == options.DiffusionParams()
    named = {field.name for field in fields(options.DiffusionParams)}
    # The texts are one field, and so are the constants of a rule.
    assert named - {"text", "constants"} == set(options.OPTIONS.values()) - {*TEXTS, *CONSTANTS}


# ---- checkpoints ----


@pytest.fixture
def damaged(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "damaged")


def refused_config(checkpoint: Path, **options: Any) -> str:
    """The message with which the configuration is refused, before any process is started."""
    with pytest.raises(ValueError, match="constants of the decoding rule") as caught:
        EngineArgs(str(checkpoint), max_model_len=512, **options).create_engine_config()
    return str(caught.value)


def change_generation_config(checkpoint: Path, **values: Any) -> None:
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("content", [None, "{}", '{"max_denoising_steps": '])
def test_a_checkpoint_without_generation_constants(damaged: Path, content: str | None):
    file = damaged / "generation_config.json"
    file.unlink() if content is None else file.write_text(content)
    message = refused_config(damaged)
    assert str(damaged) in message
    assert "max_denoising_steps is missing" in message
    assert "t_max is missing" in message
    assert "--override-generation-config" in message


def test_an_unknown_sampler_class(damaged: Path):
    change_generation_config(damaged, sampler_config={"_cls_name": "Other", "x": 1}, t_min="low")
    message = refused_config(damaged)
    assert "sampler_config must be of class EntropyBoundSamplerConfig, got 'Other'" in message
    assert "t_min must be a finite number of at least 0, got 'low'" in message


def test_the_way_out_of_a_missing_constant_works(damaged: Path):
    change_generation_config(damaged, t_max=None)
    assert "t_max is missing" in refused_config(damaged)
    EngineArgs(
        str(damaged), max_model_len=512, override_generation_config={"t_max": 0.9}
    ).create_engine_config()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def drop(file: Path) -> None:
    weights = load_file(file)
    del weights["model.decoder.layers.0.input_layernorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "cannot be read"),
        (drop, "lacks the weights of model.layers.0.input_layernorm.weight"),
    ],
)
def test_damaged_weights(
    engine_pool: EnginePool, damaged: Path, damage: Callable[[Path], None], problem: str
):
    damage(damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=problem) as caught:
        engine_pool.get(damaged)
    assert str(damaged) in str(caught.value)
    assert "fetch the checkpoint again" in str(caught.value)


# ---- engine options ----


def test_the_v1_runner_is_refused_with_the_way_out(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(UnsupportedRunnerError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        EngineArgs(str(tiny_checkpoint), max_model_len=512).create_engine_config()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 3}),
        ("logits_processors", ["helpers.engines:EnginePool"]),
        ("enable_prompt_embeds", True),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tiny_checkpoint: Path, option: str, value: object
):
    with pytest.raises(ValueError, match=option) as caught:
        EngineArgs(
            str(tiny_checkpoint), max_model_len=512, **{option: value}
        ).create_engine_config()
    assert "has no effect on a diffusion model" in str(caught.value)


def test_an_installed_logits_processor_is_refused_rather_than_left_uncalled(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    plugin = EntryPoint("shout", "loud.processor:Shout", "vllm.logits_processors")
    monkeypatch.setattr(refusals, "entry_points", lambda group: [plugin] * (group == plugin.group))
    with pytest.raises(ValueError, match=r"'shout' \(loud.processor:Shout\) has no effect"):
        EngineArgs(str(tiny_checkpoint), max_model_len=512).create_engine_config()


def test_the_served_canvas_is_the_limit_of_a_requests_own(tiny_checkpoint: Path):
    config = EngineArgs(
        str(tiny_checkpoint), max_model_len=512, diffusion_config={"canvas_length": 16}
    ).create_engine_config()
    assert config.diffusion_config.canvas_length == 16
    wide = SamplingParams(extra_args={"diffusion_canvas_length": 17})
    with pytest.raises(VLLMValidationError, match="served canvas of 16, got 17"):
        wide._validate_diffusion(config.model_config)
    SamplingParams(extra_args={"diffusion_canvas_length": 16})._validate_diffusion(
        config.model_config
    )
