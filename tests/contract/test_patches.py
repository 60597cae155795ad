"""What the ledger patches is still there, still needed, and patched only where it should be."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from concurrent.futures import Future
from pathlib import Path
from pkgutil import resolve_name

import pytest
from helpers.served import served_config
from vllm.config import StructuredOutputsConfig

from vllm_diffusion.constrain.outcomes import KeptByAutomaton
from vllm_diffusion.patches import completion_suffix, constraint_compiling, cpu_kernels
from vllm_diffusion.patches.table import PATCHES
from vllm_diffusion.patches.worker_choice import STOCK_WORKER, TRITON_FREE_WORKER
from vllm_diffusion.upstream import cpu_host, ledger, runner, torch_companions, versions
from vllm_diffusion.upstream.ledger import Stage

pytestmark = pytest.mark.vllm

ALL = {patch.name: patch for patch in PATCHES}
CPU_HOST = [
    patch.name for patch in PATCHES if patch.name.startswith("cpu-") or patch.stage is Stage.WORKER
]

PARAMETERS = {
    "vllm.config.vllm.VllmConfig._validate_v1_model_runner": ["self"],
    "vllm.config.vllm.VllmConfig._validate_v2_model_runner": ["self"],
    "vllm.config.vllm.VllmConfig._get_v2_model_runner_unsupported_features": ["self"],
    "vllm.platforms.cpu.CpuPlatform.check_and_update_config": ["vllm_config"],
    "vllm.platforms.cpu.CpuPlatform.register_triton_kernel_overrides": [],
    "vllm.triton_utils.dispatcher.register_kernels": ["overrides"],
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs": [
        "self",
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
        "weight_version",
    ],
    "vllm.v1.engine.output_processor.RequestState._new_completion_output": [
        "self",
        "token_ids",
        "finish_reason",
        "stop_reason",
    ],
    "vllm.utils.math_utils.next_power_of_2": ["n"],
    "vllm.renderers.online_renderer.OnlineRenderer.render_completion": [
        "self",
        "request",
        "skip_mm_cache",
    ],
    "vllm.sampling_params.SamplingParams._validate_structured_outputs": [
        "self",
        "model_config",
        "structured_outputs_config",
        "tokenizer",
    ],
    "vllm.sampling_params.SamplingParams.update_from_tokenizer": ["self", "tokenizer"],
    "vllm.tool_parsers.abstract_tool_parser.ToolParser.get_structural_tag": [
        "self",
        "request",
        "reasoning",
        "strict_level",
    ],
    "vllm.parser.gemma4.Gemma4Parser._fix_arg_types": ["self", "args_json", "func_name"],
    "vllm.tool_parsers.structural_tag_registry.get_structural_tag_tools": [
        "model",
        "tools",
        "tool_choice",
    ],
    "vllm.tool_parsers.structural_tag_registry.resolve_tool_strictness": [
        "tools",
        "tool_choice",
        "strict_level",
    ],
    "vllm.v1.engine.input_processor.InputProcessor._validate_lora": ["self", "lora_request"],
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels._check_load_lora_adapter_request": [
        "self",
        "request",
    ],
    "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin.load_lora_model": [
        "self",
        "model",
        "vllm_config",
        "device",
    ],
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method."
    "select_unquantized_moe_backend": ["moe_config"],
    "vllm.sampling_params.SamplingParams.update_from_generation_config": [
        "self",
        "generation_config",
        "eos_token_id",
    ],
}
"""Every function of vLLM that is replaced, wrapped or called from here, and what it takes."""

KERNEL_ARGUMENTS = {
    "buffer_utils._apply_write_kernel": (
        "output_ptr output_stride write_indices_ptr write_starts_ptr write_contents_ptr "
        "write_cu_lens_ptr write_group_ids_ptr BLOCK_SIZE MULTI_GROUP"
    ),
    "block_table._gather_block_tables_kernel": (
        "batch_idx_to_req_idx src_block_table_ptrs dst_block_table_ptrs block_table_strides "
        "num_blocks_ptr num_blocks_stride num_reqs"
    ),
    "block_table._compute_slot_mappings_kernel": (
        "max_num_tokens idx_mapping query_start_loc pos block_table_ptrs block_table_strides "
        "block_sizes slot_mapping_enabled dcp_sharded slot_mappings_ptr slot_mappings_stride "
        "cp_rank CP_SIZE CP_INTERLEAVE PAD_ID TRITON_BLOCK_SIZE"
    ),
    "input_batch._prepare_prefill_inputs_kernel": (
        "input_ids_ptr next_prefill_tokens_ptr next_prefill_tokens_stride num_lookahead "
        "idx_mapping_ptr query_start_loc_ptr all_token_ids_ptr all_token_ids_stride "
        "prefill_lens_ptr num_computed_tokens_ptr"
    ),
    "input_batch._prepare_pos_seq_lens_kernel": (
        "pos_ptr seq_lens_ptr idx_mapping_ptr query_start_loc_ptr num_computed_tokens_ptr "
        "max_num_reqs"
    ),
    "input_batch._combine_sampled_and_draft_tokens_kernel": (
        "input_ids_ptr idx_mapping_ptr last_sampled_tokens_ptr query_start_loc_ptr seq_lens_ptr "
        "prefill_len_ptr draft_tokens_ptr draft_tokens_stride cu_num_logits_ptr "
        "logits_indices_ptr BLOCK_SIZE NUM_NEW_SAMPLED_TOKENS"
    ),
    "input_batch._expand_idx_mapping_kernel": (
        "idx_mapping_ptr expanded_idx_mapping_ptr expanded_local_pos_ptr cu_num_logits_ptr"
    ),
    "input_batch._post_update_kernel": (
        "idx_mapping_ptr num_computed_tokens_ptr last_sampled_tokens_ptr output_bin_counts_ptr "
        "output_bin_counts_stride sampled_tokens_ptr sampled_tokens_stride num_sampled_ptr "
        "num_rejected_ptr query_start_loc_ptr all_token_ids_ptr all_token_ids_stride "
        "total_len_ptr"
    ),
    "input_batch._post_update_num_computed_tokens_kernel": (
        "idx_mapping_ptr num_computed_tokens_ptr query_start_loc_ptr"
    ),
    "sample.logprob._topk_log_softmax_kernel": (
        "output_ptr logits_ptr logits_stride topk_ids_ptr topk_ids_stride topk vocab_size"
    ),
    "sample.logprob._ranks_kernel": (
        "output_ptr logits_ptr logits_stride token_ids_ptr vocab_size"
    ),
    "sample.logprob._fill_logprob_token_ids_kernel": (
        "out_token_ids_ptr out_token_ids_stride out_valid_mask_ptr out_valid_mask_stride "
        "sampled_token_ids_ptr topk_indices_ptr topk_indices_stride expanded_idx_mapping_ptr "
        "num_per_req_token_ids_ptr per_req_token_ids_ptr per_req_token_ids_stride NUM_TOPK"
    ),
    "sample.prompt_logprob._prompt_logprobs_token_ids_kernel": (
        "prompt_logprobs_token_ids_ptr query_start_loc_ptr idx_mapping_ptr "
        "num_computed_tokens_ptr all_token_ids_ptr all_token_ids_stride"
    ),
    "structured_outputs._apply_grammar_bitmask_kernel": (
        "logits_ptr logits_stride logits_indices_ptr cu_num_logits_ptr bitmask_ptr "
        "bitmask_stride vocab_size MASK_STRIDE"
    ),
    "utils._zero_kv_blocks_kernel": (
        "seg_addrs_ptr seg_block_strides_ptr seg_page_sizes_ptr block_ids_ptr"
    ),
}
"""The arguments our stand-ins rely on, in order; a kernel may take more after these."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_signature(name):
    assert list(inspect.signature(resolve_name(name)).parameters) == PARAMETERS[name]


def test_the_table_can_be_registered_in_the_order_of_a_process():
    assert len(ALL) == len(PATCHES)
    stages = [patch.stage for patch in PATCHES]
    assert stages == sorted(stages, key=list(Stage).index)


def test_every_name_in_the_table_is_found():
    for patch in PATCHES:
        assert bool(patch.wraps) != bool(patch.installs), patch.name
        for target in patch.wraps:
            _ = ledger.place_of(target).value
        if patch.stage is not Stage.TORCH:  # whose targets may be what cannot be imported
            for target in patch.installs:
                resolve_name(target)
        for function in (*patch.wraps.values(), *patch.installs.values(), patch.needed):
            assert inspect.isfunction(resolve_name(function)), function


def test_the_methods_checked_before_streaming_take_what_the_check_reads():
    generate = inspect.signature(resolve_name("vllm.v1.engine.async_llm.AsyncLLM.generate"))
    assert list(generate.parameters)[:3] == ["self", "prompt", "sampling_params"]
    offline = inspect.signature(resolve_name("vllm.v1.engine.llm_engine.LLMEngine.add_request"))
    assert list(offline.parameters)[:4] == ["self", "request_id", "prompt", "params"]
    module = importlib.import_module("vllm.entrypoints.openai.responses.serving")
    responses = module.OpenAIServingResponses._generate_with_builtin_tools
    assert "sampling_params" in inspect.signature(responses).parameters
    module = inspect.getsource(module)
    assert "sampling_params=sampling_params," in module


def test_an_input_processor_has_what_text_on_a_canvas_is_written_with():
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(InputProcessor)
    for name in ("self.model_config", "self.renderer", "self.generation_config_fields"):
        assert f"{name} = " in source
    assert isinstance(InputProcessor.tokenizer, property)
    made = EngineCoreRequest.__struct_fields__
    assert {"sampling_params", "prompt_token_ids"} <= set(made)
    # Bound when an engine starts, so the patch must be in place before.
    assert "make_async(\n            self.process_inputs," in source
    engine = inspect.getsource(resolve_name("vllm.v1.engine.async_llm.AsyncLLM"))
    assert "self.input_processor = " in engine


def test_vllms_check_of_constraints_asks_its_model_for_one_thing():
    from vllm.sampling_params import SamplingParams

    check = inspect.unwrap(SamplingParams._validate_structured_outputs)
    source = inspect.getsource(check)
    assert source.count("model_config") == source.count("model_config.is_diffusion") + 1


def test_a_request_with_a_constraint_is_checked_by_both_of_our_checks_in_one_go():
    from vllm.sampling_params import SamplingParams

    verify = inspect.getsource(SamplingParams.verify)
    ours = "self._validate_diffusion(model_config)\n        self._validate_structured_outputs("
    assert ours in verify


def test_a_server_says_what_it_knows_of_a_requests_thinking():
    generate = inspect.signature(resolve_name("vllm.v1.engine.async_llm.AsyncLLM.generate"))
    assert {"reasoning_ended", "reasoning_parser_kwargs"} <= set(generate.parameters)


def suffixed(*, is_diffusion, **fields):
    """What becomes of a request with a suffix, by the patched method on a renderer of no format."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer

    async def preprocess_completion(request, **_):
        return request

    render = completion_suffix.take_suffix(inspect.unwrap(OnlineRenderer.render_completion))
    renderer = types.SimpleNamespace(
        model_config=types.SimpleNamespace(is_diffusion=is_diffusion),
        renderer=types.SimpleNamespace(render_completion_suffix=lambda *_: None),
        create_error_response=lambda message, **_: message,
        preprocess_completion=preprocess_completion,
    )
    request = CompletionRequest(prompt="a", **fields)
    return asyncio.run(render(renderer, request))


def test_a_suffix_becomes_an_option_of_a_diffusion_model():
    taken = suffixed(is_diffusion=True, suffix="b", vllm_xargs={"other": 1})
    assert taken.suffix is None
    assert taken.vllm_xargs == {"other": 1, completion_suffix.SUFFIX: "b"}
    empty = suffixed(is_diffusion=True, suffix="", echo=True)
    assert (empty.suffix, empty.vllm_xargs) == (None, None)
    refused = suffixed(is_diffusion=True, suffix="b", echo=True)
    assert refused == "suffix excludes echo"


def test_another_model_keeps_its_answer_to_a_suffix():
    refused = suffixed(is_diffusion=False, suffix="b")
    assert "only supported for models with FIM" in refused


@pytest.mark.parametrize("name", ["preprocess_chat", "preprocess_completion"])
def test_a_renderers_method_takes_its_request_first(name):
    method = resolve_name(f"vllm.renderers.online_renderer.OnlineRenderer.{name}")
    assert list(inspect.signature(method).parameters)[:2] == ["self", "request"]


@pytest.mark.parametrize("is_diffusion", [True, False])
def test_a_constraint_compiles_beside_the_event_loop(monkeypatch, is_diffusion):
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_diffusion.engine.constraints import check as constraint_check

    async def preprocess_chat(_self, _request):
        return [], [{"prompt_token_ids": [5] * 10}]

    compiled = KeptByAutomaton(data=b"", tokens=1, in_room=False)
    asked, future = [], Future()

    def compiling(source, *, limit, **_):
        asked.append((source.kind, source.text, source.end_ids, limit))
        return future

    monkeypatch.setattr(constraint_check, "compiling", compiling)
    monkeypatch.setattr(constraint_check, "vocabulary_for", lambda *_: None)
    render = constraint_compiling.compile_beside(preprocess_chat)
    model = types.SimpleNamespace(
        is_diffusion=is_diffusion,
        max_model_len=50,
        get_vocab_size=lambda: 9,
        hf_config=served_config(),
    )
    told = StructuredOutputsConfig()
    config = types.SimpleNamespace(model_config=model, structured_outputs_config=told)
    tokenizer = types.SimpleNamespace(eos_token_id=1)
    inner = types.SimpleNamespace(config=config, get_tokenizer=lambda: tokenizer)
    renderer = types.SimpleNamespace(model_config=model, renderer=inner)
    request = types.SimpleNamespace(
        extract_structured_outputs=lambda: StructuredOutputsParams(json={"type": "null"}),
        stop_token_ids=[4, 77],
    )

    async def served():
        task = asyncio.ensure_future(render(renderer, request))
        await asyncio.sleep(0.05)
        waited = not task.done()
        future.set_result(compiled)
        await task
        return waited

    assert asyncio.run(served()) is is_diffusion
    text = '{"type": "null"}'
    assert asked == [("json", text, (1, 4), 40)] * is_diffusion


def test_checks_look_at_what_their_own_request_had_compiled(monkeypatch):
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    from vllm_diffusion.engine.constraints import check as constraint_check

    calls = []

    def compiling(*_, **__):
        calls.append(future := Future())
        future.set_result(KeptByAutomaton(data=bytes([len(calls)]), tokens=1, in_room=False))
        return future

    monkeypatch.setattr(constraint_check, "compiling", compiling)
    monkeypatch.setattr(constraint_check, "vocabulary_for", lambda *_: None)
    model = types.SimpleNamespace(
        max_model_len=50,
        get_vocab_size=lambda: 9,
        hf_config=served_config(),
    )
    engine = model, StructuredOutputsConfig(), None

    def sampling(regex):
        return SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))

    async def served(own, other):
        await constraint_check.compile_first(sampling(own), *engine)
        return [
            constraint_check.constraint_for(sampling(each), *engine).data[0]
            for each in (own, own, other)
        ]

    async def both():
        return await asyncio.gather(served("a", "b"), served("c", "a"))

    # Looked up by the request that had it compiled, asked for anew by any other.
    (first, again, other), (second, same, others) = asyncio.run(both())
    assert first == again != other
    assert second == same != others
    assert len(calls) == 4


REPLIES = {
    "chat_completion_full_generator": "self request result_generator",
    "chat_completion_stream_generator": "self request result_generator",
    "request_output_to_completion_response": "self final_res_batch request",
    "completion_stream_generator": "self request engine_inputs result_generator",
    "responses_full_generator": "self request sampling_params result_generator context",
}


def test_a_method_that_builds_replies_takes_what_we_look_at_first():
    """In this order: we take them by position, as vLLM passes them."""
    places = [ledger.place_of(target) for target in ALL["telemetry-replies"].targets]
    assert {place.attribute for place in places} == set(REPLIES)
    for place in places:
        expected = REPLIES[place.attribute].split()
        assert list(inspect.signature(place.value).parameters)[: len(expected)] == expected


def test_replies_can_say_more_than_vllm_knows():
    from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel

    reply = OpenAIBaseModel()
    reply.diffusion = {"canvases": []}
    assert reply.model_dump_json() == '{"diffusion":{"canvases":[]}}'


def test_the_loggers_we_derive_from_are_made_and_called_as_we_expect():
    from vllm.v1.metrics import loggers

    # The installed logger may be ours already.
    [stock] = [
        each
        for each in inspect.getmro(loggers.PrometheusStatLogger)
        if each.__name__ == "PrometheusStatLogger"
    ]
    assert list(inspect.signature(stock.__init__).parameters) == [
        "self",
        "vllm_config",
        "engine_indexes",
    ]
    assert list(inspect.signature(stock.record).parameters) == [
        "self",
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ]
    manager = inspect.getsource(loggers.StatLoggerManager.__init__)
    assert "PrometheusStatLogger(vllm_config, self.engine_indexes)" in manager
    # Our metrics are made after this.
    assert "unregister_vllm_metrics()" in inspect.getsource(stock.__init__)


def test_choice_of_runner_is_a_property_that_reads_has_triton():
    import vllm.config.vllm as module

    assert isinstance(inspect.getattr_static(module.VllmConfig, "use_v2_model_runner"), property)
    assert isinstance(module.HAS_TRITON, bool)


def test_worker_class_has_the_name_we_replace():
    from vllm.platforms.cpu import CpuPlatform

    source = inspect.getsource(inspect.unwrap(CpuPlatform.check_and_update_config))
    assert f'"{STOCK_WORKER}"' in source


def test_jit_warm_up_has_the_switch_we_use():
    from vllm.config.kernel import KernelConfig

    assert "enable_jit_warmup" in inspect.signature(KernelConfig).parameters


def test_every_stand_in_has_its_contract():
    assert {
        name.rpartition("worker.")[2].removeprefix("gpu.") for name in cpu_kernels.stand_ins()
    } == set(KERNEL_ARGUMENTS)


@pytest.mark.parametrize("kernel", cpu_kernels.stand_ins())
def test_kernel_takes_the_arguments_its_stand_in_expects(kernel):
    # Read, not imported: a Model Runner V2 module imported too early spoils a CPU worker.
    module, _, function = kernel.rpartition(".")
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    header = source.split(f"def {function}(")[1].split("):\n")[0]
    found = [
        line.split(":")[0].split("=")[0].strip(" ,")
        for line in (line.split("#")[0] for line in header.splitlines())
    ]
    expected = KERNEL_ARGUMENTS[kernel.rpartition("worker.")[2].removeprefix("gpu.")].split()
    assert [name for name in found if name][: len(expected)] == expected


@pytest.mark.parametrize("name", ALL)
def test_patch_is_needed_by_the_lowest_tested_vllm(name):
    """A row that fails here has served its time: delete it, or raise its `remove_when`."""
    patch = ALL[name]
    if not versions.is_lowest_tested(versions.require_supported_vllm()):
        pytest.skip("only the lowest tested vLLM decides when a patch can go")
    if name not in ledger.active() and not patch.applies():
        pytest.skip("does not apply on this host")
    assert patch.is_needed(), f"{', '.join(patch.targets)}: {patch.remove_when}"


@pytest.mark.parametrize("name", CPU_HOST)
def test_patch_of_a_cpu_host_is_inert_on_cuda(monkeypatch, name):
    cuda = types.SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr("vllm.platforms.current_platform", cuda)
    assert not ALL[name].applies()


@pytest.mark.parametrize("name", CPU_HOST)
def test_patch_of_a_cpu_host_is_inert_beside_a_triton_backend(monkeypatch, name):
    monkeypatch.setattr(
        "vllm.platforms.current_platform", types.SimpleNamespace(is_cpu=lambda: True)
    )
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert not ALL[name].applies()


@pytest.mark.parametrize("package", torch_companions.LIBRARIES)
def test_companions_are_left_alone_beside_a_gpu_torch(monkeypatch, package):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.delitem(sys.modules, package, raising=False)
    assert not torch_companions.cannot_load(package)


def test_applying_on_cuda_changes_nothing(monkeypatch):
    from vllm.config.vllm import VllmConfig
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(
        "vllm.platforms.current_platform", types.SimpleNamespace(is_cpu=lambda: False)
    )
    monkeypatch.setattr(ledger, "_installed", {})
    before = dict(vars(VllmConfig)), dict(vars(CpuPlatform))
    assert ledger.apply(ALL[name] for name in CPU_HOST) == ()
    assert (dict(vars(VllmConfig)), dict(vars(CpuPlatform))) == before


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python without the plugin, which therefore starts unpatched."""
    quiet = {"VLLM_DIFFUSION": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    clean = {key: value for key, value in os.environ.items() if key != runner.RUNNER_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean | quiet | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


TWICE = """
from vllm.config.vllm import VllmConfig
from vllm.platforms.cpu import CpuPlatform
from vllm_diffusion.upstream import ledger
from vllm_diffusion.patches import completion_suffix, constraint_compiling, cpu_kernels
from vllm_diffusion.patches.table import PATCHES
rows = [p for p in PATCHES if p.name.startswith("cpu-") or p.name == "runner-refusal"]
stock = dict(vars(VllmConfig))
first = ledger.apply(rows)
state = dict(vars(VllmConfig)), dict(vars(CpuPlatform))
assert ledger.apply(rows) == first
assert (dict(vars(VllmConfig)), dict(vars(CpuPlatform))) == state
assert set(first) <= set(ledger.active())
assert (stock != state[0]) and "runner-refusal" in first
"""


def test_applying_twice_is_applying_once():
    run = python(TWICE)
    assert run.returncode == 0, run.stderr


IMPORTS = """
import sys
from vllm_diffusion.upstream import runner
from vllm_diffusion.patches import table
from vllm_diffusion.upstream import versions
wrappers = {name for name in sys.modules if name.startswith("vllm_diffusion.patches.")}
assert wrappers == {f"vllm_diffusion.patches.{name}" for name in ("table", "serving_table")}
versions.require_supported_vllm()
heavy = {"vllm", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_table_imports_neither_vllm_nor_torch():
    run = python(IMPORTS)
    assert run.returncode == 0, run.stderr


CONFIGURE = """
import json, os, sys
from vllm import EngineArgs
from vllm_diffusion.upstream import ledger, runner
from vllm_diffusion.patches import completion_suffix, constraint_compiling, cpu_kernels
from vllm_diffusion.patches.table import PATCHES
patched, models = sys.argv[1], sys.argv[2:]
if patched == "patched":
    ledger.apply(p for p in PATCHES if p.name.startswith("cpu-") or p.name == "runner-refusal")

def outcome(model):
    try:
        config = EngineArgs(
            model=model, tokenizer=model, skip_tokenizer_init=True, dtype="float32"
        ).create_engine_config()
    except Exception as error:
        return [type(error).__name__, str(error)]
    import vllm.config.vllm, vllm.triton_utils
    assert vllm.config.vllm.HAS_TRITON == vllm.triton_utils.HAS_TRITON
    return [config.use_v2_model_runner, config.parallel_config.worker_cls]

results = {}
for variable in ("unset", "0", "1"):
    if variable != "unset":
        os.environ[runner.RUNNER_VARIABLE] = variable
    for model in models:
        results[os.path.basename(model) + " " + variable] = outcome(model)
print("RESULT" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[object]]]:
    """Runner and worker, or error, of two models, per value of the variable, stock and patched."""
    if not cpu_host.is_triton_free_cpu():
        pytest.skip("needs a CPU host without a Triton backend")
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64}
    text = DiffusionGemmaTextConfig(**sizes, **heads, layer_types=["full_attention"])
    configs = {
        "llama": LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"]),
        "diffusion": DiffusionGemmaConfig(
            text_config=text,
            canvas_length=8,
            architectures=["DiffusionGemmaForBlockDiffusion"],
        ),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    found = {}
    for kind in ("stock", "patched"):
        run = python(CONFIGURE, kind, *(str(folder / name) for name in configs))
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, run.stderr[-3000:]
        found[kind] = json.loads(lines[0].removeprefix("RESULT"))
    return found


@pytest.mark.parametrize("variable", ["unset", "0", "1"])
def test_another_model_keeps_its_runner_and_worker(outcomes, variable):
    patched, stock = (outcomes[kind][f"llama {variable}"] for kind in ("patched", "stock"))
    assert patched == stock


def test_a_diffusion_model_starts_without_environment_variables(outcomes):
    assert outcomes["patched"]["diffusion unset"] == [True, TRITON_FREE_WORKER]
    assert outcomes["stock"]["diffusion unset"][0] == "ValidationError"


def test_forcing_the_old_runner_is_refused_in_one_sentence(outcomes):
    error, message = outcomes["patched"]["diffusion 0"]
    assert error == "UnsupportedRunnerError"
    assert message == runner.runner_refusal("0", [])
    assert "\n" not in message


PROCESSOR = """
import torch
from transformers import AutoProcessor
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
import vllm.model_executor.models.gemma4_mm
"""


def test_gemmas_processor_imports_in_a_fresh_process():
    run = python(PROCESSOR)
    assert run.returncode == 0, run.stderr[-3000:]


def test_patches_that_torch_installs_are_active_where_they_apply():
    """In this process too, or they are not wanted here."""
    early = [patch for patch in PATCHES if patch.stage is Stage.TORCH]
    assert [p.name for p in early if p.name not in ledger.active() and p.applies()] == []
