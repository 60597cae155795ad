"""Images in chats: under templates that take plain text, and where no tower could see them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM, RequestOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Writes what the checkpoint's own template writes, and never looks for parts.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] "
    "+ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
PLAIN_TEXT: dict[str, dict[str, Any]] = {
    "a template of plain text": {"chat_template": PLAIN},
    "content format string": {"chat_template_content_format": "string"},
}
"""Ways to have vLLM hand a message to the template as one string."""

RED, BLUE = (
    Image.new("RGB", size, colour) for colour, size in (("red", (96, 64)), ("blue", (40, 200)))
)
MARK = "<|image|>"


def message(*parts: str | Image.Image) -> list[Any]:
    """One turn of the user."""
    kinds = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_pil", "image_pil": part}
        for part in parts
    ]
    return [{"role": "user", "content": kinds}]


def chat(llm: LLM, messages: list[Any], **how: Any) -> RequestOutput:
    sampling = SamplingParams(max_tokens=32, seed=1, ignore_eos=True)
    return llm.chat(messages, sampling, use_tqdm=False, **how)[0]


def written(answer: RequestOutput) -> tuple[list[int], list[int]]:
    """The prompt as the model read it, images expanded, and the answer."""
    return list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)


@pytest.mark.parametrize("how", PLAIN_TEXT.values(), ids=PLAIN_TEXT)
def test_a_message_as_plain_text_shows_the_same_images_in_their_places(
    engine: Callable[..., LLM], how: dict[str, Any]
) -> None:
    llm = engine()
    placed = message(RED, BLUE, f"What are{MARK}and{MARK}?")
    own = written(chat(llm, message("What are", RED, "and", BLUE, "?")))
    assert written(chat(llm, placed, **how)) == own
    # vLLM puts what the text has no place for before it, a line each.
    alone, both = (
        written(chat(llm, message(*images, "What is this?"), **how))[0]
        for images in ((RED,), (RED, BLUE))
    )
    image = llm.get_tokenizer().convert_tokens_to_ids(MARK)
    assert 0 < alone.count(image) < both.count(image)
    # What is seen, and in which order, is in the answer.
    swapped = written(chat(llm, message(BLUE, RED, f"What are{MARK}and{MARK}?"), **how))
    assert swapped[1] != own[1]


# ---- a checkpoint of text alone ----


@pytest.fixture(params=["no vision_config", "vision_config null"])
def text_alone(request: Any, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without its tower."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "text")
    config = json.loads((folder / "config.json").read_text()) | {"vision_config": None}
    if request.param == "no vision_config":
        del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    text = {name: weight for name, weight in weights.items() if "vision" not in name}
    assert len(text) < len(weights)
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def answer(engine_pool: EnginePool, tiny_checkpoint: Path) -> tuple[list[int], list[int]]:
    """What the checkpoint with its tower says to a text."""
    return written(chat(engine_pool.get(tiny_checkpoint), message("What is this?")))


def test_a_checkpoint_without_a_tower_serves_text_and_refuses_images(
    engine: Callable[..., LLM], text_alone: Path, answer: tuple[list[int], list[int]]
) -> None:
    llm = engine(text_alone)
    assert written(chat(llm, message("What is this?"))) == answer
    with pytest.raises(VLLMValidationError, match="At most 0 image"):
        chat(llm, message(RED, "What is this?"))
