"""A byte-level BPE tokenizer and chat template shaped like Gemma 4's, at any vocabulary size.

Takes a vocabulary size. Gives the files of a tokenizer and of a Gemma 4 processor. Never downloads:
the training text is part of the package, so the same size gives the same bytes everywhere.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from vllm_diffusion.testing.byte_tokenizer import BYTES, byte_tokenizer
from vllm_diffusion.testing.json_file import write_json
from vllm_diffusion.testing.training_text import LINES

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
TURN_START, TURN_END = "<|turn>", "<turn|>"
IMAGE, IMAGE_START, IMAGE_END = "<|image|>", "<|image>", "<image|>"
AUDIO, AUDIO_START, AUDIO_END = "<|audio|>", "<|audio>", "<audio|>"
VIDEO = "<|video|>"

SPECIAL_TOKENS = (
    *(PAD, EOS, BOS, UNK, TURN_START, TURN_END, IMAGE, IMAGE_START, IMAGE_END),
    *(AUDIO, AUDIO_START, AUDIO_END, VIDEO),
    # What vLLM's Gemma 4 reasoning and tool parsers look for.
    *("<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
"""In id order: the id of a special token is its index here, at every vocabulary size."""

MIN_VOCAB = len(SPECIAL_TOKENS) + BYTES

# Content is a string or a list of parts; iterating over it is also how vLLM recognises a template
# that takes parts.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
{%- endif %}
"""


def token_id(token: str) -> int:
    """Id of a special token; ValueError for any other string."""
    return SPECIAL_TOKENS.index(token)


def build_tokenizer(vocab: int, corpus: Iterable[str] = LINES) -> Tokenizer:
    """Train a tokenizer with exactly `vocab` ids; digits are always separate tokens."""
    return byte_tokenizer(vocab, corpus, special_tokens=SPECIAL_TOKENS, bos=BOS)


def write_processor_files(
    directory: Path, *, tokenizer: Tokenizer, soft_tokens: int, patch: int
) -> None:
    """Write tokenizer, chat template and processor configuration, as Transformers would save them.

    Written by hand rather than through `Gemma4Processor`, so that making a checkpoint needs no
    image or audio libraries. `soft_tokens` is the most an image may occupy in the prompt.
    """
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "backend": "tokenizers",
            "tokenizer_class": "TokenizersBackend",
            "processor_class": "Gemma4Processor",
            "model_max_length": 1 << 30,
            "padding_side": "left",
            "pad_token": PAD,
            "eos_token": EOS,
            "bos_token": BOS,
            "unk_token": UNK,
            "image_token": IMAGE,
            "boi_token": IMAGE_START,
            "eoi_token": IMAGE_END,
            "audio_token": AUDIO,
            "boa_token": AUDIO_START,
            "eoa_token": AUDIO_END,
            "extra_special_tokens": list(SPECIAL_TOKENS[4:]),
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    pixels = {
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_resize": True,
        "max_soft_tokens": soft_tokens,
        "patch_size": patch,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    write_json(
        directory / "processor_config.json",
        {
            "processor_class": "Gemma4Processor",
            "image_seq_length": soft_tokens,
            "audio_ms_per_token": 40,
            "audio_seq_length": 750,
            "image_processor": {
                **pixels,
                "image_processor_type": "Gemma4ImageProcessor",
                "do_normalize": False,
            },
            # Gemma 4's processor class takes both of these even where the model has neither tower.
            "video_processor": {**pixels, "video_processor_type": "Gemma4VideoProcessor"},
            "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        },
    )
