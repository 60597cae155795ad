"""The files of a byte-level tokenizer for a checkpoint of text alone."""

from collections.abc import Sequence
from pathlib import Path

from vllm_diffusion.testing.byte_tokenizer import byte_tokenizer
from vllm_diffusion.testing.json_file import write_json
from vllm_diffusion.testing.training_text import LINES


def write_tokenizer(
    directory: Path,
    *,
    vocab: int,
    special_tokens: Sequence[str],
    roles: dict[str, str],
    chat_template: str,
    bos: bool = False,
) -> None:
    """Write tokenizer and chat template as Transformers would save them.

    Args:
        directory: where to.
        vocab: ids; a token for each.
        special_tokens: the first ids, in this order.
        roles: `eos_token` and the like, and which of them it is; `bos_token` with `bos`.
        chat_template: Jinja.
        bos: whether every text begins with the bos token.

    Raises:
        ValueError: the vocabulary is too small.
    """
    tokenizer = byte_tokenizer(
        vocab, LINES, special_tokens=special_tokens, bos=roles["bos_token"] if bos else None
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = set(roles.values())
    write_json(
        directory / "tokenizer_config.json",
        {
            "backend": "tokenizers",
            "tokenizer_class": "TokenizersBackend",
            "model_max_length": 1 << 30,
            **roles,
            "extra_special_tokens": [token for token in special_tokens if token not in named],
        },
    )
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
