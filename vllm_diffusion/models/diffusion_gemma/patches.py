"""What this family changes in vLLM, as rows of the table of patches."""

from __future__ import annotations

from typing import Final

from vllm_diffusion.upstream.ledger import Patch, Stage

PATCHES: Final = (
    Patch(
        name="gemma-tools",
        stage=Stage.SERVING,
        wraps={
            "vllm.tool_parsers.gemma4_engine_tool_parser:Gemma4EngineToolParser."
            "structural_tag_model": "vllm_diffusion.models.diffusion_gemma.tool_parser:name_form",
            "vllm.tool_parsers.gemma4_engine_tool_parser:Gemma4EngineToolParser."
            "get_structural_tag": (
                "vllm_diffusion.models.diffusion_gemma.tool_parser:constrain_calls"
            ),
        },
        why="a call that is required, named or strict is enforced for other formats; for Gemma's "
        "it is hoped for.",
        upstream_reference="xgrammar/builtin_structural_tag.py: _get_gemma_4_structural_tag",
        remove_when="vLLM has a structural tag for gemma_4",
        needed="vllm_diffusion.models.diffusion_gemma.tool_parser:calls_are_free",
    ),
    Patch(
        name="gemma-arguments",
        stage=Stage.SERVING,
        wraps={
            "vllm.parser.gemma4:Gemma4Parser._fix_arg_types": (
                "vllm_diffusion.models.diffusion_gemma.tool_parser:type_arguments"
            )
        },
        why="a number behind a $ref, a constant or a member that properties do not name comes back "
        "as a text, which is not what the tool's schema says.",
        upstream_reference="vllm/tool_parsers/utils.py: extract_types_from_schema",
        remove_when="vLLM follows the whole schema for the types of arguments",
        needed="vllm_diffusion.models.diffusion_gemma.tool_parser:arguments_are_texts",
    ),
)
