"""Files of a user's task and verifiers."""

from __future__ import annotations

import pytest

from vllm_diffusion.errors import TuneError
from vllm_diffusion.tune.items import TaskItem, load_items, load_verifier


def item(answer):
    return TaskItem(messages=[{"role": "user", "content": "?"}], answer=answer)


def test_a_prompt_is_a_turn_or_a_conversation(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text(
        '{"prompt": "a", "answer": "b"}\n\n'
        '{"prompt": [{"role": "system", "content": "c"}], "answer": {"d": 1}, "max_tokens": 7}\n'
    )
    assert load_items(file) == [
        TaskItem(messages=[{"role": "user", "content": "a"}], answer="b"),
        TaskItem(messages=[{"role": "system", "content": "c"}], answer={"d": 1}, max_tokens=7),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ("[1]", "not an object"),
        ('{"answer": 1}', "prompt must be"),
        ('{"prompt": ""}', "prompt must be"),
        ('{"prompt": [{"content": "x"}]}', "prompt must be"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens must be"),
        ("[" * 100_000, "recursion"),
        ('{"prompt": "a", "solution": 1}', "unknown solution; accepted: prompt, answer"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(TuneError) as caught:
        load_items(file)
    assert "line 2" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_is_as_editors_and_json_write_it(tmp_path):
    """With a byte order mark, line ends of Windows, and separators that end no line of JSON."""
    file = tmp_path / "task.jsonl"
    text = "a\u2028b\u0085c"
    lines = (f'{{"prompt": "{text}"}}', '{"prompt": "d"}')
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [item.messages[0]["content"] for item in load_items(file)] == [text, "d"]


def test_all_wrong_lines_are_named_as_far_as_a_message_goes(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("[]\n" * 12)
    with pytest.raises(TuneError, match=r"line 1: .*line 10: .* and 2 more"):
        load_items(file)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_items_is_refused(tmp_path, content):
    file = tmp_path / "task.jsonl"
    file.write_text(content)
    with pytest.raises(TuneError, match="holds no items"):
        load_items(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(TuneError, match="cannot be read"):
        load_items(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TuneError, match="cannot be read"):
        load_items(tmp_path / "binary")


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "score"),
    [
        ("exact", " 4\n", "4", 1),
        ("exact", "4.", "4", 0),
        ("exact", "4", 4, 1),
        ("contains", "it is 4.", "4", 1),
        ("contains", "it is 5.", "4", 0),
        ("json", '{"a": 1,  "b": 2}', {"b": 2, "a": 1}, 1),
        ("json", '{"a": 1}', '{ "a": 1 }', 1),
        ("json", '{"a": 1', {"a": 1}, 0),
    ],
)
def test_the_verifiers(verifier, text, answer, score):
    assert load_verifier(verifier)(text, item(answer)) == score


def test_a_function_of_a_file_verifies(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def half(text, item):\n    return 0.5 if text == item.answer else 0\n")
    score = load_verifier(f"{file}:half")
    assert score("x", item("x")) == 0.5
    assert score("y", item("x")) == 0


@pytest.mark.parametrize(
    ("code", "function", "said"),
    [
        ("def f(", "f", "cannot be run"),
        ("x = 1", "f", "has no 'f'"),
        ("f = 1", "f", "is not a function"),
        ("def f(text, item): return 2", "f", "not a number from 0 to 1"),
        ("def f(text, item): return float('nan')", "f", "not a number from 0 to 1"),
        ("def f(text, item): return text.nothing", "f", "failed on 'x'"),
    ],
)
def test_a_verifier_that_cannot_judge_is_refused(tmp_path, code, function, said):
    file = tmp_path / "mine.py"
    file.write_text(code + "\n")
    with pytest.raises(TuneError, match=said):
        load_verifier(f"{file}:{function}")("x", item("x"))


@pytest.mark.parametrize("name", ["best", "nowhere.py:f", "README:f"])
def test_a_verifier_that_is_not_there_is_refused(name):
    with pytest.raises(TuneError):
        load_verifier(name)
