"""A copy of a checkpoint whose tokenizer has given words as tokens: `... labels SOURCE DIR`.

Takes a checkpoint folder with a byte-level BPE tokenizer. Gives a copy that vLLM's decisions can be
asked of: they need every label of an answer as one token, and tiny tokenizers lack "yes". Each
word takes the id of a token that the tokenizer merged last, and the row of the embedding stays, so
the model knows nothing of the word.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("yes", "no")
"""What `/v1/systemone` answers with beside letters and digits, which every tokenizer has."""


def with_labels(
    source: str | Path, target: str | Path, words: Sequence[str] = LABELS, *, apart: bool = False
) -> Path:
    """Copy `source` to `target`, which must not exist, and make a token of every word.

    Args:
        source: checkpoint folder.
        target: folder of the copy; returned.
        words: those that the vocabulary has already keep their ids.
        apart: no merge goes across the border of a word, as if all of them were special tokens. A
            text is then the tokens of its parts, wherever a word stands.
    """
    target = Path(shutil.copytree(source, target))
    file = target / "tokenizer.json"
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = state["model"]["vocab"]
    for word in words:
        if word not in vocabulary:
            state["added_tokens"].append(_added(word, _last_merged(state["model"])))
        elif apart:
            state["added_tokens"].append(_added(word, vocabulary[word]))
    file.write_text(json.dumps(state, ensure_ascii=False, indent=2), encoding="utf-8")
    return target


def _added(word: str, token: int) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token, "content": word, **dict.fromkeys(flags, False)}


def _last_merged(model: dict[str, Any]) -> int:
    """Forget the last merge and its token; the id that is free then."""
    left, right = _pair(model["merges"].pop())
    token: int = model["vocab"].pop(left + right)
    return token


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def main() -> None:
    """Copy the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    print(with_labels(options.source, options.target))


if __name__ == "__main__":
    main()
