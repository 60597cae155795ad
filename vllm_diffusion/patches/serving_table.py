"""Rows of THE TABLE that are installed in the process that serves a diffusion model.

They check and complete a request where it enters, and add telemetry to its answer.
"""

from __future__ import annotations

from typing import Final

from vllm_diffusion.upstream.ledger import Patch, Stage

SERVING_PATCHES: Final = (
    Patch(
        name="malformed-bodies",
        stage=Stage.SERVING,
        wraps={
            "vllm.entrypoints.launchers.app:init_exception_handler": (
                "vllm_diffusion.patches.malformed_requests:check_bodies"
            )
        },
        why="half a surrogate pair in a request becomes an internal error where it is first "
        "encoded; deep nesting becomes one, or ends the engine, where it is first walked.",
        upstream_reference="vllm/entrypoints/serve/utils/api_utils.py: validate_json_request",
        remove_when="vLLM refuses both, by name",
        needed="vllm_diffusion.patches.malformed_requests:malformed_bodies_are_let_in",
    ),
    Patch(
        name="check-before-streaming",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.engine.async_llm:AsyncLLM.generate": (
                "vllm_diffusion.patches.request_entry:check_before_streaming"
            )
        },
        why="a streamed request is checked only after its answer has begun with status 200, so a "
        "client's mistake arrives as an event in the stream, or as a broken connection.",
        upstream_reference="vllm/v1/engine/async_llm.py: AsyncLLM.generate",
        remove_when="vLLM checks a request before it starts to stream the answer",
        needed="vllm_diffusion.patches.request_entry:generate_is_checked_late",
    ),
    Patch(
        name="check-before-streaming-responses",
        stage=Stage.SERVING,
        wraps={
            "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses."
            "_generate_with_builtin_tools": (
                "vllm_diffusion.patches.request_entry:check_before_streaming_responses"
            )
        },
        why="the same for /v1/responses, which asks the engine from a generator of its own.",
        upstream_reference="vllm/entrypoints/openai/responses/serving.py: "
        "_generate_with_builtin_tools",
        remove_when="vLLM checks a request before it starts to stream the answer",
        needed="vllm_diffusion.patches.request_entry:responses_are_checked_late",
    ),
    Patch(
        name="nested-texts",
        stage=Stage.SERVING,
        wraps={
            "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": (
                "vllm_diffusion.patches.malformed_requests:refuse_nested_texts"
            )
        },
        why="JSON inside a text, such as the arguments of an earlier call, may nest too deep for "
        "its reader, which is answered with status 500.",
        upstream_reference="vllm/renderers/chat_utils.py: _postprocess_messages",
        remove_when="vLLM answers 400 to a RecursionError while it renders a request",
        needed="vllm_diffusion.patches.malformed_requests:nesting_is_an_internal_error",
    ),
    Patch(
        name="media-errors",
        stage=Stage.SERVING,
        wraps={
            "vllm.multimodal.media.connector:MediaConnector.load_from_url_async": (
                "vllm_diffusion.patches.media_errors:blame_the_link"
            )
        },
        why="a link to media that cannot be loaded is answered with status 500 or 501.",
        upstream_reference="vllm/multimodal/media/connector.py: _wrap_media_fetch_error",
        remove_when="vLLM answers 400 to media that cannot be loaded",
        needed="vllm_diffusion.patches.media_errors:links_are_internal_errors",
    ),
    Patch(
        name="request-admission",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
                "vllm_diffusion.patches.request_entry:admit_requests"
            )
        },
        why="what a request asks for is known as a whole where it meets tokenizer, prompt and "
        "limits: text on the canvas becomes ids there, a constraint fits behind the prompt or not, "
        "and nothing of ours is asked.",
        upstream_reference="vllm/v1/engine/input_processor.py: process_inputs",
        remove_when="a model class can complete and check its own requests with tokenizer and "
        "prompt",
        needed="vllm_diffusion.patches.request_entry:requests_lack_a_hook",
    ),
    Patch(
        name="constraint-thinking",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.engine.llm_engine:LLMEngine.add_request": (
                "vllm_diffusion.patches.request_entry:check_thinking_offline"
            )
        },
        why="a request whose reasoning parser cannot say where its constraint begins ends the "
        "engine, from within the scheduler.",
        upstream_reference="vllm/v1/structured_output/__init__.py: _get_reasoner",
        remove_when="vLLM asks the reasoning parser before a request enters the engine",
        needed="vllm_diffusion.patches.request_entry:thinking_is_unchecked_offline",
    ),
    Patch(
        name="constraint-compile",
        stage=Stage.SERVING,
        wraps={
            "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": (
                "vllm_diffusion.patches.constraint_compiling:compile_beside"
            ),
            "vllm.renderers.online_renderer:OnlineRenderer.preprocess_completion": (
                "vllm_diffusion.patches.constraint_compiling:compile_beside"
            ),
        },
        why="compiling a constraint takes a moment, and a request is checked in the event loop, "
        "where all other requests wait.",
        upstream_reference="vllm/v1/engine/async_llm.py: AsyncLLM.add_request",
        remove_when="vLLM checks requests outside of the event loop",
        needed="vllm_diffusion.patches.constraint_compiling:requests_are_checked_in_the_loop",
    ),
    Patch(
        name="completion-suffix",
        stage=Stage.SERVING,
        wraps={
            "vllm.renderers.online_renderer:OnlineRenderer.render_completion": (
                "vllm_diffusion.patches.completion_suffix:take_suffix"
            )
        },
        why="vLLM refuses a suffix unless the tokenizer has a format for it; a canvas needs none.",
        upstream_reference="vllm/renderers/online_renderer.py: render_completion",
        remove_when="a model class can say that it takes a suffix",
        needed="vllm_diffusion.patches.completion_suffix:suffix_is_refused",
    ),
    Patch(
        name="adapter-check",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.engine.input_processor:InputProcessor._validate_lora": (
                "vllm_diffusion.patches.adapter_requests:check_requests"
            ),
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels."
            "_check_load_lora_adapter_request": (
                "vllm_diffusion.patches.adapter_requests:check_loading"
            ),
        },
        why="a LoRA adapter is read in the first step that needs it, where one that does not fit "
        "ends the engine; loaded ahead over HTTP, it is answered with status 500.",
        upstream_reference="vllm/v1/engine/input_processor.py: _validate_lora; "
        "vllm/entrypoints/openai/models/serving.py: load_lora_adapter",
        remove_when="vLLM checks an adapter before a request enters the engine, and answers 400 to "
        "one that cannot be loaded",
        needed="vllm_diffusion.patches.adapter_requests:adapters_are_checked_late",
    ),
    Patch(
        name="telemetry-outputs",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
                "vllm_diffusion.patches.telemetry_outputs:take_reports_off"
            ),
            "vllm.v1.engine.output_processor:RequestState._new_completion_output": (
                "vllm_diffusion.patches.telemetry_outputs:tell_in_completions"
            ),
        },
        why="the scheduler's report on a request's canvases travels in a field that vLLM would "
        "show to every client, and an answer has no field for it.",
        upstream_reference="vllm/v1/engine/__init__.py: EngineCoreOutput has fixed fields; "
        "vllm/outputs.py: CompletionOutput",
        remove_when="an engine's output and a completion carry what a plugin has to say",
        needed="vllm_diffusion.patches.telemetry_outputs:outputs_have_no_free_field",
    ),
    Patch(
        name="telemetry-metrics",
        stage=Stage.SERVING,
        wraps={
            "vllm.v1.metrics.loggers:PrometheusStatLogger": (
                "vllm_diffusion.patches.telemetry_metrics:count_canvases"
            )
        },
        why="a logger added by a plugin overrides --disable-log-stats, and vLLM's own logger "
        "unregisters its metrics.",
        upstream_reference="vllm/v1/engine/async_llm.py: has_custom_loggers; "
        "vllm/v1/metrics/prometheus.py: unregister_vllm_metrics",
        remove_when="a stat logger plugin leaves --disable-log-stats alone",
        needed="vllm_diffusion.patches.telemetry_metrics:logger_plugins_switch_statistics_on",
    ),
    Patch(
        name="telemetry-replies",
        stage=Stage.SERVING,
        wraps={
            "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat."
            "chat_completion_full_generator": "vllm_diffusion.patches.telemetry_replies:chat",
            "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat."
            "chat_completion_stream_generator": (
                "vllm_diffusion.patches.telemetry_replies:chat_stream"
            ),
            "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion."
            "request_output_to_completion_response": (
                "vllm_diffusion.patches.telemetry_replies:completion"
            ),
            "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion."
            "completion_stream_generator": (
                "vllm_diffusion.patches.telemetry_replies:completion_stream"
            ),
            "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses."
            "responses_full_generator": "vllm_diffusion.patches.telemetry_replies:responses",
        },
        why="a reply over HTTP is built field by field, and has no field for telemetry.",
        upstream_reference="vllm/entrypoints/openai/*/serving.py: the methods by these names",
        remove_when="vLLM's replies carry what a plugin has to say",
        needed="vllm_diffusion.patches.telemetry_replies:replies_are_silent",
    ),
)
