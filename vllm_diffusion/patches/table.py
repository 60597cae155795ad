"""THE TABLE: every patch on vLLM, in the order they are installed.

To add one: write its installer (and what it wraps) in a file of its own here, add a row below, and
a contract test of the target's signature in `tests/contract/`. `applies` and `needed` are written
next to the installer when they are more than a line. A row must not import vLLM or torch until one
of its functions is called. The first rows stand in `early_patches.py`.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Final

from vllm_diffusion.patches import (
    canvas_text,
    constraint_compiling,
    cpu_kernels,
    gemma_tools,
    lora,
    malformed_requests,
    media_errors,
    request_validation,
    serving_config,
    structured_outputs,
    telemetry_outputs,
    telemetry_replies,
)
from vllm_diffusion.patches.early import EARLY_PATCHES
from vllm_diffusion.upstream import cpu_host
from vllm_diffusion.upstream.ledger import Patch


def _always() -> bool:
    return True


PATCHES: Final = (
    *EARLY_PATCHES,
    Patch(
        name="runner-refusal",
        target="vllm.config.vllm.VllmConfig._validate_v1_model_runner",
        why="a diffusion model forced onto Model Runner V1 is refused without saying what did it.",
        upstream_reference="vllm/config/vllm.py: _validate_v1_model_runner",
        remove_when="vLLM's own refusal names VLLM_USE_V2_MODEL_RUNNER",
        applies=_always,
        install=cpu_host.explain_runner_refusal,
        needed=lambda: cpu_host.RUNNER_VARIABLE not in _config_source("_validate_v1_model_runner"),
    ),
    Patch(
        name="cpu-runner-choice",
        target="vllm.config.vllm.VllmConfig.use_v2_model_runner",
        why="on a CPU host without Triton vLLM picks Model Runner V1, which has no diffusion.",
        upstream_reference="vllm/config/vllm.py: use_v2_model_runner",
        remove_when="the choice of runner no longer asks for Triton on CPU",
        applies=cpu_host.is_triton_free_cpu,
        install=cpu_host.allow_runner_choice,
        needed=lambda: "HAS_TRITON" in _config_source("use_v2_model_runner"),
    ),
    Patch(
        name="cpu-runner-validation",
        target="vllm.config.vllm.VllmConfig._validate_v2_model_runner",
        why="on a CPU host without Triton vLLM 0.32 refuses Model Runner V2 even when asked to.",
        upstream_reference="vllm/config/vllm.py: _validate_v2_model_runner (check gone in 0.33)",
        remove_when="the lowest tested vLLM is 0.33",
        applies=cpu_host.is_triton_free_cpu,
        install=cpu_host.allow_runner_validation,
        needed=lambda: "HAS_TRITON" in _config_source("_validate_v2_model_runner"),
    ),
    Patch(
        name="cpu-worker",
        target="vllm.platforms.cpu.CpuPlatform.check_and_update_config",
        why="the worker of a diffusion model must get stand-ins for Triton kernels before its "
        "first step, and vLLM's own hook for that does not know which model is served.",
        upstream_reference="vllm/platforms/cpu.py: register_triton_kernel_overrides",
        remove_when="vLLM registers CPU versions of Model Runner V2's kernels itself",
        applies=cpu_host.is_triton_free_cpu,
        install=cpu_host.choose_worker,
        needed=cpu_kernels.are_needed,
    ),
    Patch(
        name="request-validation",
        target="vllm.sampling_params.SamplingParams._validate_diffusion",
        why="vLLM refuses parameters that a canvas can honour, such as seed, and lets others "
        "through that it then ignores.",
        upstream_reference="vllm/sampling_params.py: _validate_diffusion",
        remove_when="a model class can validate its own requests",
        applies=_always,
        install=request_validation.check_requests_ourselves,
        needed=request_validation.stock_check_refuses_seed,
    ),
    Patch(
        name="structured-outputs",
        target="vllm.sampling_params.SamplingParams._validate_structured_outputs",
        why="vLLM refuses every constraint of a diffusion model, since a mask that reads from left "
        "to right cannot constrain a canvas.",
        upstream_reference="vllm/sampling_params.py: _validate_structured_outputs",
        remove_when="a model class can say that it takes constraints, and check them",
        applies=_always,
        install=structured_outputs.take_constraints,
        needed=structured_outputs.diffusion_is_refused,
    ),
    Patch(
        name="serving-config",
        target="vllm.model_executor.models.config.MODELS_CONFIG_MAP",
        why="scheduler and limits of an out-of-tree model have to be set before the engine starts.",
        upstream_reference="vllm/model_executor/models/config.py: MODELS_CONFIG_MAP",
        remove_when="a registered model class can bring its own config hook",
        applies=_always,
        install=serving_config.install_serving_config,
        needed=serving_config.architecture_is_in_table,
    ),
)
"""Installed by the plugin in every process vLLM starts."""

SERVING_PATCHES: Final = (
    Patch(
        name="malformed-bodies",
        target="vllm.entrypoints.launchers.app.init_exception_handler",
        why="half a surrogate pair in a request is an internal error wherever it is first written, "
        "and what nests deep is one, or ends the engine, wherever it is first walked.",
        upstream_reference="vllm/entrypoints/serve/utils/api_utils.py: validate_json_request",
        remove_when="vLLM refuses both, by name",
        applies=_always,
        install=malformed_requests.check_bodies,
        needed=malformed_requests.malformed_bodies_are_let_in,
    ),
    Patch(
        name="check-before-streaming",
        target="vllm.v1.engine.async_llm.AsyncLLM.generate",
        why="a streamed request is checked after its answer began with status 200, so a client's "
        "mistake came as an event in the stream, or as a broken connection.",
        upstream_reference="vllm/v1/engine/async_llm.py: AsyncLLM.generate",
        remove_when="vLLM checks a request before it starts to stream the answer",
        applies=_always,
        install=request_validation.check_before_streaming,
        needed=request_validation.generate_is_checked_late,
    ),
    Patch(
        name="check-before-streaming-responses",
        target="vllm.entrypoints.openai.responses.serving.OpenAIServingResponses."
        "_generate_with_builtin_tools",
        why="the same for /v1/responses, which asks the engine from a generator of its own.",
        upstream_reference="vllm/entrypoints/openai/responses/serving.py: "
        "_generate_with_builtin_tools",
        remove_when="vLLM checks a request before it starts to stream the answer",
        applies=_always,
        install=request_validation.check_before_streaming_responses,
        needed=request_validation.responses_are_checked_late,
    ),
    Patch(
        name="nested-texts",
        target="vllm.renderers.online_renderer.OnlineRenderer.preprocess_chat",
        why="JSON in a text, such as the arguments of an earlier call, may nest deeper than what "
        "reads it can follow, which is answered with status 500.",
        upstream_reference="vllm/renderers/chat_utils.py: _postprocess_messages",
        remove_when="vLLM answers 400 to a RecursionError while it renders a request",
        applies=_always,
        install=malformed_requests.refuse_nested_texts,
        needed=malformed_requests.nesting_is_an_internal_error,
    ),
    Patch(
        name="media-errors",
        target="vllm.multimodal.media.connector.MediaConnector.load_from_url_async",
        why="a link to an image that leads nowhere is answered with status 500.",
        upstream_reference="vllm/multimodal/media/connector.py: _wrap_media_fetch_error",
        remove_when="vLLM answers 400 to media that cannot be loaded",
        applies=_always,
        install=media_errors.blame_the_link,
        needed=media_errors.links_are_internal_errors,
    ),
    Patch(
        name="canvas-text",
        target="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        why="a template, suffix or draft is text in the request's options, and nothing of ours is "
        "asked where the tokenizer could make ids of it.",
        upstream_reference="vllm/v1/engine/input_processor.py: process_inputs",
        remove_when="a model class can complete its own requests with the tokenizer",
        applies=_always,
        install=canvas_text.write_rows,
        needed=canvas_text.requests_lack_a_hook,
    ),
    Patch(
        name="constraint-room",
        target="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        why="whether a constrained text fits behind its prompt is known where the prompt is, and "
        "nothing of ours is asked there, where it could also leave for the engine compiled.",
        upstream_reference="vllm/v1/engine/input_processor.py: process_inputs",
        remove_when="a model class can check its own requests beside their prompts",
        applies=_always,
        install=constraint_compiling.send_compiled,
        needed=canvas_text.requests_lack_a_hook,
    ),
    Patch(
        name="constraint-thinking",
        target="vllm.v1.engine.llm_engine.LLMEngine.add_request",
        why="a constraint whose beginning the reasoning parser cannot find ends the engine, from "
        "within its scheduler.",
        upstream_reference="vllm/v1/structured_output/__init__.py: _get_reasoner",
        remove_when="vLLM asks the reasoning parser before a request enters the engine",
        applies=_always,
        install=request_validation.check_thinking_offline,
        needed=request_validation.thinking_is_unchecked_offline,
    ),
    *(
        Patch(
            name=f"constraint-compile-{name.rpartition('_')[2]}",
            target=f"vllm.renderers.online_renderer.OnlineRenderer.{name}",
            why="a constraint compiles for a moment, and a request is checked in the event loop, "
            "where everybody waits.",
            upstream_reference="vllm/v1/engine/async_llm.py: AsyncLLM.add_request",
            remove_when="vLLM checks requests outside of the event loop",
            applies=_always,
            install=partial(constraint_compiling.compile_beside, name),
            needed=constraint_compiling.requests_are_checked_in_the_loop,
        )
        for name in ("preprocess_chat", "preprocess_completion")
    ),
    Patch(
        name="completion-suffix",
        target="vllm.renderers.online_renderer.OnlineRenderer.render_completion",
        why="vLLM refuses a suffix unless the tokenizer has a format for it; a canvas holds it.",
        upstream_reference="vllm/renderers/online_renderer.py: render_completion",
        remove_when="a model class can say that it takes a suffix",
        applies=_always,
        install=canvas_text.take_suffix,
        needed=canvas_text.suffix_is_refused,
    ),
    Patch(
        name="gemma-tools",
        target="vllm.tool_parsers.gemma4_engine_tool_parser.Gemma4EngineToolParser."
        "get_structural_tag",
        why="a call that is required, named or strict is enforced for other formats; for Gemma's "
        "it is hoped for.",
        upstream_reference="xgrammar/builtin_structural_tag.py: _get_gemma_4_structural_tag",
        remove_when="vLLM has a structural tag for gemma_4",
        applies=_always,
        install=gemma_tools.constrain_calls,
        needed=gemma_tools.calls_are_free,
    ),
    Patch(
        name="gemma-arguments",
        target="vllm.parser.gemma4.Gemma4Parser._fix_arg_types",
        why="a number behind a $ref, a constant or a member that properties do not name comes back "
        "as a text, which is not what the tool's schema says.",
        upstream_reference="vllm/tool_parsers/utils.py: extract_types_from_schema",
        remove_when="vLLM follows the whole schema for the types of arguments",
        applies=_always,
        install=gemma_tools.type_arguments,
        needed=gemma_tools.arguments_are_texts,
    ),
    Patch(
        name="adapter-check",
        target="vllm.v1.engine.input_processor.InputProcessor._validate_lora",
        why="a LoRA adapter is read in the step that needs it first, and one that does not fit "
        "ends the engine.",
        upstream_reference="vllm/v1/engine/input_processor.py: _validate_lora",
        remove_when="vLLM checks an adapter before its request enters the engine",
        applies=_always,
        install=lora.check_adapters,
        needed=lora.adapters_are_loaded_unchecked,
    ),
    Patch(
        name="adapter-check-loading",
        target="vllm.entrypoints.openai.models.serving.OpenAIServingModels."
        "_check_load_lora_adapter_request",
        why="an adapter that does not fit is answered with status 500.",
        upstream_reference="vllm/entrypoints/openai/models/serving.py: load_lora_adapter",
        remove_when="vLLM answers 400 to an adapter that cannot be loaded",
        applies=_always,
        install=lora.check_loaded_adapters,
        needed=lora.refused_adapters_are_internal_errors,
    ),
    Patch(
        name="telemetry-outputs",
        target="vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
        why="what the scheduler knows about a request's canvases leaves in a field that vLLM would "
        "show to every client.",
        upstream_reference="vllm/v1/engine/__init__.py: EngineCoreOutput has fixed fields",
        remove_when="an engine's output carries what a plugin has to say",
        applies=_always,
        install=telemetry_outputs.take_reports_off,
        needed=telemetry_outputs.outputs_have_no_place_of_their_own,
    ),
    Patch(
        name="telemetry-completions",
        target="vllm.v1.engine.output_processor.RequestState._new_completion_output",
        why="an answer has no field that says what its canvases took.",
        upstream_reference="vllm/outputs.py: CompletionOutput",
        remove_when="a completion carries what a plugin has to say",
        applies=_always,
        install=telemetry_outputs.tell_in_completions,
        needed=telemetry_outputs.completions_have_no_place_of_their_own,
    ),
    Patch(
        name="telemetry-metrics",
        target="vllm.v1.metrics.loggers.PrometheusStatLogger",
        why="a logger from outside switches --disable-log-stats off, and vLLM's own unregisters "
        "its metrics.",
        upstream_reference="vllm/v1/engine/async_llm.py: has_custom_loggers; "
        "vllm/v1/metrics/prometheus.py: unregister_vllm_metrics",
        remove_when="a stat logger plugin leaves --disable-log-stats alone",
        applies=_always,
        install=telemetry_outputs.count_in_metrics,
        needed=telemetry_outputs.logger_plugins_switch_statistics_on,
    ),
    *(
        Patch(
            name=f"telemetry-{door.name}",
            target=door.target,
            why="a reply over HTTP is built field by field, and none says what the canvases took.",
            upstream_reference=f"{door.module.replace('.', '/')}.py: {door.method}",
            remove_when="vLLM's replies carry what a plugin has to say",
            applies=_always,
            install=door.install,
            needed=door.is_silent,
        )
        for door in telemetry_replies.DOORS
    ),
)
"""Installed by `engine.serving` in the process that is about to serve a diffusion model: what they
import is there already, and would only slow down the start of every other process."""

WORKER_PATCHES: Final = (
    Patch(
        name="placeholder-next-power-of-2",
        target="vllm.triton_utils.triton.next_power_of_2",
        why="Model Runner V2 calls it on the host to size blocks; vLLM's placeholder lacks it.",
        upstream_reference="vllm/triton_utils/importing.py: TritonPlaceholder",
        remove_when="TritonPlaceholder has next_power_of_2",
        applies=cpu_host.is_triton_free_cpu,
        install=cpu_kernels.complete_placeholder,
        needed=cpu_kernels.placeholder_is_incomplete,
    ),
    Patch(
        name="model-runner-kernels",
        target="vllm.v1.worker.gpu: the kernels listed in cpu_kernels.stand_ins",
        why="Model Runner V2 launches Triton kernels every step; without a backend there are none.",
        upstream_reference="vllm/triton_utils/dispatcher.py: register_kernels",
        remove_when="vLLM registers CPU versions of Model Runner V2's kernels itself",
        applies=cpu_host.is_triton_free_cpu,
        install=cpu_kernels.install,
        needed=cpu_kernels.are_needed,
    ),
)
"""Installed by `cpu_worker.TritonFreeCPUWorker`, in the worker process of a diffusion model."""

ADAPTER_PATCHES: Final = (
    Patch(
        name="lora-manager",
        target="vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin.load_lora_model",
        why="vLLM's adapters know one kind of row a request, and on a CPU give rows without an "
        "adapter that of another request.",
        upstream_reference="vllm/v1/worker/lora_model_runner_mixin.py: load_lora_model; "
        "vllm/lora/ops/torch_ops/lora_ops.py: index -1",
        remove_when="a model class can bring its own manager of adapters",
        applies=lora.adapters_are_served,
        install=lora.take_adapters,
        needed=lora.manager_is_fixed,
    ),
    Patch(
        name="lora-experts",
        target="vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method."
        "select_unquantized_moe_backend",
        why="with LoRA on, experts are computed by Triton on every platform, adapted or not.",
        upstream_reference="vllm/model_executor/layers/fused_moe/oracle/unquantized.py: "
        "is_lora_enabled",
        remove_when="vLLM has experts for CPUs that adapters can change, and keeps its choice for "
        "experts that none does",
        applies=lora.adapters_are_served,
        install=lora.choose_experts,
        needed=lora.adapted_experts_are_triton,
    ),
)
"""Installed by a diffusion model that is built with LoRA on, before its first layer."""


def _config_source(name: str) -> str:
    from vllm.config.vllm import VllmConfig

    member = inspect.getattr_static(VllmConfig, name)
    function: Any = member.fget if isinstance(member, property) else member
    return inspect.getsource(inspect.unwrap(function))
