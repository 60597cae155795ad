"""The names and signatures of vLLM that engine/ and models/ lean on.

Not what vLLM does with them, the engine tests show that: what must still be there for our code to
be called at all. A failure here after raising the vLLM pin says where to look first.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import textwrap
from typing import Any

import pytest
from helpers.cases import for_each
from vllm.utils.import_utils import resolve_obj_by_qualname

pytestmark = pytest.mark.vllm

# Overridden by us: vLLM calls ours with its own arguments, so the names must be the same.
OVERRIDES = [
    (
        "vllm.v1.worker.gpu.model_states.interface.ModelState",
        "vllm_diffusion.engine.model_state.CanvasModelState",
        [
            "add_request",
            "remove_request",
            "prepare_attn",
            "prepare_inputs_embeds",
            "prepare_inputs",
            "prepare_dummy_inputs",
            "custom_sampler",
            "get_additional_cg_support",
        ],
    ),
    (
        "vllm.v1.core.sched.diffusion_scheduler.DiffusionAsyncScheduler",
        "vllm_diffusion.engine.scheduler.AsyncCanvasScheduler",
        ["schedule", "update_from_output", "update_draft_token_ids"],
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler",
        "vllm_diffusion.engine.scheduler.CanvasScheduler",
        ["schedule", "update_from_output", "update_draft_token_ids"],
    ),
    (
        "vllm.v1.structured_output.backend_types.StructuredOutputBackend",
        "vllm_diffusion.engine.constraints.backend.ConstraintBackend",
        ["__init__", "compile_grammar", "allocate_token_bitmask", "destroy"],
    ),
    (
        "vllm.v1.structured_output.backend_types.StructuredOutputGrammar",
        "vllm_diffusion.engine.constraints.backend.ConstraintGrammar",
        [
            "accept_tokens",
            "validate_tokens",
            "rollback",
            "fill_bitmask",
            "is_terminated",
            "reset",
        ],
    ),
    (
        "vllm.model_executor.models.gemma4.Gemma4DecoderLayer",
        "vllm_diffusion.models.diffusion_gemma.layers.CanvasDecoderLayer",
        ["forward"],
    ),
    (
        "vllm.model_executor.models.config.VerifyAndUpdateConfig",
        "vllm_diffusion.engine.serving.CanvasServing",
        ["verify_and_update_config"],
    ),
]

# Called by us: these parameters must exist.
CALLS = {
    **{
        f"vllm.sampling_params.SamplingParams._validate_{what}": {"model_config"}
        for what in ("logprobs", "logit_bias", "stop_token_ids", "allowed_token_ids")
    },
    "vllm.v1.worker.gpu.attn_utils.build_attn_metadata": {
        "attn_groups",
        "num_reqs",
        "num_tokens",
        "query_start_loc_gpu",
        "query_start_loc_cpu",
        "max_query_len",
        "seq_lens",
        "max_seq_len",
        "block_tables",
        "slot_mappings",
        "kv_cache_config",
        "seq_lens_cpu_upper_bound",
        "mm_req_doc_ranges",
        "for_cudagraph_capture",
        "causal",
    },
    "vllm._custom_ops.cpu_attention_with_kv_cache": {
        "query",
        "key_cache",
        "value_cache",
        "output",
        "query_start_loc",
        "seq_lens",
        "scale",
        "causal",
        "alibi_slopes",
        "sliding_window",
        "block_table",
        "softcap",
        "scheduler_metadata",
        "s_aux",
        "dynamic_causal",
        "k_scale",
        "v_scale",
        "kv_cache_dtype",
    },
    "vllm._custom_ops.cpu_attn_get_scheduler_metadata": {
        "num_reqs",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "seq_lens",
        "dtype",
        "query_start_loc",
        "causal",
        "sliding_window_size",
        "isa",
        "enable_kv_split",
        "dynamic_causal",
        "kv_cache_dtype",
    },
    "vllm.v1.core.sched.diffusion_scheduler.diffusion_canvas_width": {"request", "canvas_length"},
    "vllm.v1.attention.backends.registry.register_backend": {"backend", "class_path"},
    "vllm.utils.torch_utils.async_tensor_h2d": {"data", "device"},
}

# Records of vLLM and the fields we read or fill.
FIELDS = {
    "vllm.v1.worker.gpu.input_batch.InputBatch": {
        "req_ids",
        "num_reqs",
        "num_reqs_after_padding",
        "idx_mapping",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "num_scheduled_tokens",
        "num_tokens",
        "num_tokens_after_padding",
        "num_draft_tokens",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "prefill_len_np",
        "num_computed_prefill_tokens_np",
        "is_prefilling_np",
        "input_ids",
        "logits_indices",
        "cu_num_logits_np",
    },
    "vllm.v1.worker.gpu.sample.output.SamplerOutput": {
        "sampled_token_ids",
        "logprobs_tensors",
        "num_nans",
        "num_sampled",
        "num_rejected",
        "sampling_mask_tensors",
    },
    "vllm.v1.outputs.ModelRunnerOutput": {"req_id_to_index", "sampled_token_ids", "sampling_masks"},
    "vllm.v1.core.sched.output.SchedulerOutput": {
        "scheduled_spec_decode_tokens",
        "scheduled_new_reqs",
        "has_structured_output_requests",
        "pending_structured_output_tokens",
    },
    "vllm.v1.core.sched.output.NewRequestData": {
        "req_id",
        "prompt_token_ids",
        "prefill_token_ids",
        "sampling_params",
    },
    "vllm.v1.structured_output.request.StructuredOutputRequest": {"params", "reasoning_ended"},
    "vllm.config.structured_outputs.StructuredOutputsConfig": {
        "disable_any_whitespace",
        "enable_in_reasoning",
        "reasoning_parser",
    },
    "vllm.v1.outputs.DraftTokenIds": {"req_ids", "draft_token_ids"},
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadata": {
        "num_actual_tokens",
        "max_query_len",
        "query_start_loc",
        "max_seq_len",
        "seq_lens",
        "block_table",
        "slot_mapping",
        "scheduler_metadata",
    },
    "vllm.config.diffusion.DiffusionConfig": {"canvas_length", "max_denoising_steps"},
}

# Attributes of objects we did not build; named in the constructors of their classes.
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler.Scheduler": [
        "self.running",
        "self.max_num_scheduled_tokens",
        "self.max_model_len",
        "self.num_spec_tokens",
        "self.current_step",
        "self.log_stats",
        "self.requests",
        "self.structured_output_manager",
    ],
    "vllm.v1.request.Request": [
        "self.num_computed_tokens",
        "self.num_output_placeholders",
        "self.next_decode_eligible_step",
    ],
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder": [
        "self.window_size",
        "self.num_heads",
        "self.num_kv_heads",
        "self.head_dim",
        "self.dtype",
        "self.isa",
        "self.kv_cache_dtype",
    ],
    "vllm.v1.worker.gpu.sample.sampler.Sampler": ["self.req_states"],
    "vllm.v1.worker.gpu.states.RequestState": ["self.draft_tokens"],
    "vllm.model_executor.models.gemma4.Gemma4DecoderLayer": ["layer_scalar", "self.self_attn"],
    "vllm.v1.worker.gpu.mm.encoder_cache.EncoderCache": ["self.mm_features"],
}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("theirs", "ours", "method"),
    [(theirs, ours, method) for theirs, ours, methods in OVERRIDES for method in methods],
)
def test_an_override_takes_what_vllm_passes(theirs: str, ours: str, method: str) -> None:
    base = parameters(getattr(resolve_obj_by_qualname(theirs), method))
    override = parameters(getattr(resolve_obj_by_qualname(ours), method))
    takes_anything = "kwargs" in override
    assert [name for name in base if name not in override and not takes_anything] == []


@pytest.mark.parametrize("function", CALLS)
def test_a_function_we_call_takes_what_we_pass(function: str) -> None:
    assert CALLS[function] - set(parameters(pkgutil.resolve_name(function))) == set()


@for_each(record=FIELDS)
def test_a_record_has_the_fields_we_use(record: str) -> None:
    fields = {field.name for field in dataclasses.fields(resolve_obj_by_qualname(record))}
    assert FIELDS[record] - fields == set()


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_an_object_we_are_handed_has_the_attributes_we_read(owner: str) -> None:
    source = inspect.getsource(resolve_obj_by_qualname(owner))
    assert [name for name in ATTRIBUTES[owner] if name not in source] == []


def borrowed_from_vllm(owner: type) -> dict[str, Any]:
    """Functions in the body of a class that were written for another one."""
    functions = {name: getattr(owner, name) for name, value in vars(owner).items()}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function) and function.__module__.startswith("vllm.")
    }


def asked_of_self(function: Any) -> set[str]:
    """Names that a method reads or calls on its first argument."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    if not tree.args.args:
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == tree.args.args[0].arg
        and isinstance(node.ctx, ast.Load)
    }


def set_on_self(owner: type) -> set[str]:
    """Names that the methods of a class assign on `self`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner))))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and isinstance(node.ctx, ast.Store)
    }


def test_a_method_we_borrow_finds_everything_it_asks_of_itself() -> None:
    ours = resolve_obj_by_qualname(
        "vllm_diffusion.models.diffusion_gemma.model.DiffusionGemmaForBlockDiffusion"
    )
    borrowed = borrowed_from_vllm(ours)
    assert "embed_multimodal" in borrowed
    assert "vision_tower" in asked_of_self(borrowed["_process_image_input"])
    present = set(dir(ours)) | set_on_self(ours)
    # No input of a request leads there: DiffusionGemma hears nothing.
    sound = {"_parse_and_validate_audio_input", "_process_audio_input"}
    missing = {name: asked_of_self(method) - present - sound for name, method in borrowed.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def test_the_runner_hands_the_sampler_what_compute_logits_gave() -> None:
    # CanvasSampler takes hidden rows because the model hands them through compute_logits. This
    # holds as long as the runner does nothing between the two but the grammar mask.
    runner = resolve_obj_by_qualname("vllm.v1.worker.gpu.model_runner.GPUModelRunner")
    source = inspect.getsource(runner.sample)
    assert "logits = self.model.compute_logits(sample_hidden_states)" in source
    assert "self.sampler(logits, input_batch)" in source


def test_what_stands_for_sampling_masks_is_read_back_with_the_tokens() -> None:
    # CommittedCanvases travels there: copied beside the tokens, before the one wait for both.
    module = resolve_obj_by_qualname("vllm.v1.worker.gpu.async_utils.AsyncOutput")
    start, end = inspect.getsource(module.__init__), inspect.getsource(module.get_output)
    copied = start.index("sampler_output.sampling_mask_tensors.to_cpu_nonblocking()")
    assert start.index("sampler_output.sampled_token_ids") < copied
    assert copied < start.index("self.copy_event.record(copy_stream)")
    assert "self.sampling_mask_tensors.tolists(self.num_sampled_tokens_np)" in end
    assert "self.model_runner_output.sampling_masks = (" in end


def test_nothing_but_a_served_option_reads_sampling_masks() -> None:
    # That option is refused at start, so the place is free.
    scheduler = resolve_obj_by_qualname("vllm.v1.core.sched.scheduler.Scheduler")
    source = inspect.getsource(scheduler)
    assert source.count("model_runner_output.sampling_masks") == 1
    before = source[: source.index("model_runner_output.sampling_masks")]
    assert before.rstrip().endswith(
        "if self.return_sampling_mask:\n                sampling_masks ="
    )


def test_an_output_carries_a_dictionary_of_anything() -> None:
    import msgspec
    from vllm.v1.engine import EngineCoreOutput

    said = EngineCoreOutput("name", [1], kv_transfer_params={"diffusion": [True, 3, 1, 0.5, "x"]})
    heard = msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=EngineCoreOutput)
    assert heard.kv_transfer_params == said.kv_transfer_params


def test_the_manager_of_constraints_keeps_a_backend_that_is_there() -> None:
    manager = resolve_obj_by_qualname("vllm.v1.structured_output.StructuredOutputManager")
    init = inspect.getsource(manager.grammar_init)
    # Ours is put there by the scheduler, which is made before the first request.
    assert init.index("if self.backend is None:") < init.index("self.backend = XgrammarBackend(")
    create = inspect.getsource(manager._create_grammar)
    assert "self.backend.compile_grammar(" in create
    assert "stop_token_ids=stop_token_ids" in create
    assert "self.executor.submit(self._create_grammar, request)" in init


def test_masks_hang_on_the_two_flags_that_the_scheduler_takes_back() -> None:
    scheduler = resolve_obj_by_qualname("vllm.v1.core.sched.scheduler.Scheduler")
    bitmask = inspect.getsource(scheduler.get_grammar_bitmask)
    assert (
        "if not scheduler_output.has_structured_output_requests:\n            return None"
        in bitmask
    )
    core = inspect.getsource(resolve_obj_by_qualname("vllm.v1.engine.core.EngineCore"))
    assert "if not scheduler_output.pending_structured_output_tokens:" in core


def test_a_preempted_request_is_sent_to_the_worker_like_a_new_one() -> None:
    schedule = inspect.getsource(
        resolve_obj_by_qualname("vllm.v1.core.sched.scheduler.Scheduler").schedule
    )
    assert "scheduled_new_reqs.extend(scheduled_resumed_reqs)" in schedule


def test_kinds_of_constraints_have_the_names_our_compiler_knows() -> None:
    from vllm_diffusion.constrain.language.kinds import KINDS

    options = resolve_obj_by_qualname(
        "vllm.v1.structured_output.backend_types.StructuredOutputOptions"
    )
    assert {option.name.lower() for option in options} == set(KINDS)


def test_the_reasoning_that_vllm_waits_for_is_asked_as_we_ask() -> None:
    manager = resolve_obj_by_qualname("vllm.v1.structured_output.StructuredOutputManager")
    assert parameters(manager._get_constraint_bounds)[:3] == ["self", "request", "spec_tokens"]
    assert parameters(manager._get_reasoner) == ["self", "request"]
    bounds = resolve_obj_by_qualname("vllm.v1.structured_output.ConstraintBounds")
    assert "constraint_start" in bounds._fields
    parser = resolve_obj_by_qualname("vllm.reasoning.ReasoningParser")
    assert parameters(parser.is_reasoning_end_streaming) == ["self", "input_ids", "delta_ids"]
    assert isinstance(parser.reasoning_end_str, property)
    described = resolve_obj_by_qualname("vllm.parser.engine.adapters.ParserEngineReasoningAdapter")
    assert isinstance(described.reasoning_end_token_ids, property)
