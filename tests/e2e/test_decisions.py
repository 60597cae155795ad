"""`/v1/systemone` of vLLM through the plugin: the numbers, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from helpers.engines import SERVER_OPTIONS
from helpers.oracle import Oracle
from transformers import AutoTokenizer

from vllm_diffusion.testing.labels import with_labels
from vllm_diffusion.testing.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.server, pytest.mark.slow]

STATE = "Ticket 7: nobody can log in, two customers called."
QUESTIONS: dict[str, Any] = {
    "down": {"type": "noul", "instructions": "Is the service down?"},
    "team": {
        "type": "choice",
        "instructions": "Who should look?",
        "criteria": {"network": None, "billing": "money", "login": "accounts"},
    },
    "worry": {"type": "score", "instructions": "How bad?", "criteria": ["fine", "bad", "worse"]},
}
# What the model is shown behind the state, and the labels that it may answer with.
SHOWN = {
    "down": ("Is the service down?\nyes\nno\nAnswer with yes or no only.", ["yes", "no"]),
    "team": (
        (
            "Who should look?\nA: network\nB: billing - money\nC: login - accounts\n"
            "Answer with the letter of one option only."
        ),
        ["A", "B", "C"],
    ),
    "worry": (
        "How bad?\n0: fine\n1: bad\n2: worse\nAnswer with the number of one level only.",
        ["0", "1", "2"],
    ),
}
WIDTH = 16
CHAT = {"messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": 60}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_labels(tiny_checkpoint, tmp_path_factory.mktemp("labels") / "tiny")


@pytest.fixture(scope="module")
def raw(checkpoint: Path) -> Iterator[httpx.Client]:
    """A client of a server whose tokenizer has every label."""
    with (
        serve(checkpoint, *SERVER_OPTIONS, "--served-model-name", "tiny") as running,
        httpx.Client(base_url=running.url, timeout=300) as client,
    ):
        yield client


def decide(raw: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "state": STATE, "questions": QUESTIONS} | more
    return raw.post("/v1/systemone", json=body)


def answers(raw: httpx.Client, **more: Any) -> dict[str, Any]:
    reply = decide(raw, **more)
    assert reply.status_code == 200, reply.text
    answered: dict[str, Any] = reply.json()["answers"]
    return answered


@torch.no_grad()
def test_the_numbers_are_those_of_transformers_over_the_same_canvas(
    raw: httpx.Client, checkpoint: Path
) -> None:
    reply = decide(raw)
    assert reply.status_code == 200, reply.text
    found, told = reply.json()["answers"], reply.json()["diagnostics"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = Oracle(checkpoint).model
    end, pad = tokenizer.convert_tokens_to_ids(["<turn|>", "<pad>"])
    rows = 0
    for name, (question, labels) in SHOWN.items():
        turn = {"role": "user", "content": f"{STATE}\n\nQuestion: {question}"}
        shown = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(shown, add_special_tokens=False)
        rng = random.Random(hashlib.sha256(json.dumps(prompt).encode()).digest())
        canvas = [rng.randrange(len(tokenizer)), end, *[pad] * (WIDTH - 2)]
        prompt += tokenizer.encode("<|channel>thought\n<channel|>", add_special_tokens=False)
        rows += len(prompt)
        logits = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([canvas])
        ).logits[0, 0]
        ids = tokenizer.convert_tokens_to_ids(labels)
        among = logits.double()[ids].softmax(0).tolist()
        mass = float(logits.double().softmax(0)[ids].sum())

        assert list(found[name]["probabilities"].values()) == pytest.approx(among, abs=1e-5)
        assert told[name]["label_mass"] == pytest.approx(mass, rel=1e-3)
        assert 0 < told[name]["label_mass"] <= 1
        assert told[name]["argmax_is_label"] is (int(logits.argmax()) in ids)
        assert found[name]["type"] == QUESTIONS[name]["type"]
        assert found[name]["confidence"] == pytest.approx(max(among) * mass, rel=1e-3)
    assert found["down"]["noul"] == found["down"]["probabilities"]["yes"]
    assert reply.json()["usage"] == {"input_tokens": rows, "output_tokens": 2 * len(SHOWN)}


def test_as_many_options_as_there_are_labels(raw: httpx.Client) -> None:
    options = [f"o{number}" for number in range(26)]
    asked = {"type": "choice", "criteria": dict.fromkeys(options)}
    found = answers(raw, questions={"x": asked})["x"]
    assert list(found["probabilities"]) == options
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["probabilities"][found["choice"]] == max(found["probabilities"].values())


def test_who_else_asks_changes_nothing(raw: httpx.Client) -> None:
    first = answers(raw)
    assert answers(raw) == first
    crowd = {f"q{n}": {"type": "noul", "instructions": f"Is {n} above 9?"} for n in range(20)}

    def same(**more: Any) -> None:
        found = answers(raw, **more)
        for name in found.keys() & first.keys():
            expected = first[name]["probabilities"]
            assert found[name]["probabilities"] == pytest.approx(expected, abs=1e-5)

    with ThreadPoolExecutor(8) as pool:
        chats = [
            pool.submit(raw.post, "/v1/chat/completions", json={"model": "tiny", "seed": n} | CHAT)
            for n in range(4)
        ]
        reads = [
            *(pool.submit(same, questions={name: each}) for name, each in QUESTIONS.items()),
            *(pool.submit(same, questions=crowd | QUESTIONS) for _ in range(3)),
        ]
        for read in reads:
            read.result()
        assert {chat.result().status_code for chat in chats} == {200}
    same(questions=crowd | QUESTIONS)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"questions": {"x": {"type": "essay"}}}, "'essay'"),
        ({"questions": {}}, "at least one question"),
        ({"questions": {f"q{n}": QUESTIONS["down"] for n in range(65)}}, "at most 64"),
        ({"questions": {"x": {"type": "choice", "criteria": {}}}}, "'x'"),
        (
            {
                "questions": {
                    "x": {"type": "choice", "criteria": dict.fromkeys(map(str, range(27)))}
                }
            },
            "at most 26 options",
        ),
        ({"questions": {"x": {"type": "score", "criteria": ["bad", "bad"]}}}, "duplicate"),
        ({"questions": {"x": {"type": "score", "criteria": ["only"]}}}, "ordered list"),
        ({"questions": {"x": {"type": "noul", "options": 2}}}, "options"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "thinking"),
        ({"audio": ["data:audio/wav;base64,AAAA"]}, "audio"),
        ({"images": ["data:image/png;base64,AAAA"]}, "image"),
        ({"state": "word " * 600}, "512"),
        ({"state": "0" * 420}, "max_model_len=512"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    raw: httpx.Client, more: dict[str, Any], says: str
) -> None:
    reply = decide(raw, **more)
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]["message"]
    assert raw.get("/health").status_code == 200


def test_a_tokenizer_without_the_labels_is_not_asked(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as raw:
        reply = decide(raw)
        assert reply.status_code == 501, reply.text
        assert "does not support" in reply.json()["error"]["message"]
        assert raw.get("/health").status_code == 200
