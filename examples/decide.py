"""Let a model decide, and see how sure it is: typed answers with probabilities, a forward each.

    python examples/decide.py                               # the tiny model of this folder
    python examples/decide.py --url http://localhost:8000   # the one that you serve

Questions go to vLLM's `/v1/systemone`. The tiny model has never learnt what a question is: its bars
show the form, and mean nothing. What it has learnt is sudoku, so it is then asked for every gap of
one, all of them on one canvas, in one forward.
"""

import argparse
import json
import random
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vllm_diffusion.testing import server
from vllm_diffusion.testing.labels import with_labels

CHECKPOINT = Path(__file__).parent / "tiny-diffusiongemma"
SMALL = ("--max-model-len=1024", "--kv-cache-memory-bytes=64M", "--enforce-eager")
WIDTH = 24  # of a bar

TICKET = "Since noon nobody can log in. Two customers called, one of them shouted."
QUESTIONS: dict[str, dict[str, Any]] = {
    "Is the service down?": {"type": "noul"},
    "Who should look at it?": {
        "type": "choice",
        "criteria": {"network": None, "billing": "money", "login": "accounts and passwords"},
    },
    "How bad is it?": {"type": "score", "criteria": ["fine", "annoying", "bad", "on fire"]},
}
SUDOKU = "0423/3200/4100/0040"


def main() -> None:
    """Ask the server of the command line, or one of the tiny model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", help="of a server, instead of starting one")
    url = parser.parse_args().url
    if url:
        ticket(url)
        return
    with tempfile.TemporaryDirectory() as folder:
        # A decision needs each of its labels as one token, and the tiny tokenizer has no "yes".
        checkpoint = with_labels(CHECKPOINT, Path(folder, "tiny"))
        print("vllm serve", checkpoint.name, *SMALL)
        with server.serve(checkpoint, *SMALL) as running:
            ticket(running.url)
            sudoku(running.url, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))


def ticket(url: str) -> None:
    """Three questions about one text, each read in one forward."""
    asked = {name: {**each, "instructions": name} for name, each in QUESTIONS.items()}
    answer = post(url, "systemone", {"state": TICKET, "questions": asked})
    print(f"\n{TICKET}")
    for name, found in answer["answers"].items():
        mass = answer["diagnostics"][name]["label_mass"]
        print(f"\n  {name}   (all labels together: {mass:.1e} of the vocabulary)")
        legend = found.get("legend", {})
        for label, probability in found["probabilities"].items():
            bar(legend.get(label, label), probability)


def sudoku(url: str, tokenizer: Tokenizer) -> None:
    """Every gap of a sudoku from one canvas: noise in the gaps, one step, the digits' scores."""
    canvas = [tokenizer.token_to_id(cell) for cell in SUDOKU]
    digits = {tokenizer.token_to_id(digit): digit for digit in "1234"}
    gaps = [at for at, cell in enumerate(SUDOKU) if cell == "0"]
    rng = random.Random(0)  # noqa: S311 -- reproducible, not secret
    for at in gaps:
        canvas[at] = rng.randrange(tokenizer.get_vocab_size())
    canvas.append(tokenizer.token_to_id("<turn|>"))
    canvas += [tokenizer.token_to_id("<pad>")] * (32 - len(canvas))
    request = {
        "messages": [{"role": "user", "content": f"sudoku {SUDOKU}"}],
        "max_tokens": len(SUDOKU),
        "logprobs": True,
        "top_logprobs": 1 + len(digits),
        "logprob_token_ids": list(digits),
        "vllm_xargs": {
            "diffusion_seed_canvas": canvas,
            "diffusion_canvas_length": len(canvas),
            "diffusion_max_steps": 1,
            "diffusion_read_only": True,
        },
    }
    places = post(url, "chat/completions", request)["choices"][0]["logprobs"]["content"]
    print(f"\nsudoku {SUDOKU}: {len(gaps)} gaps, one canvas, one forward\n")
    filled = list(SUDOKU)
    for at in gaps:
        best = max(places[at]["top_logprobs"], key=lambda each: each["logprob"])
        filled[at] = best["token"]
        bar(f"row {at // 5 + 1}, cell {at % 5 + 1}: {filled[at]}", 2.718281828 ** best["logprob"])
    print(f"\n  {''.join(filled)}")


def bar(name: str, share: float) -> None:
    """One line."""
    print(f"    {name:<16} {'#' * round(WIDTH * share):<{WIDTH}} {share:.2f}")


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask the server's only model."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:  # noqa: S310
        model = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/{path}",
        json.dumps({"model": model, **body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
    return found


if __name__ == "__main__":
    main()
