import json

import pytest

from ssiuu_fast.data.example import Example
from ssiuu_fast.data.jsonl import load_jsonl

GOOD = '{"question": "Q", "answer": "A"}'


@pytest.fixture()
def write(tmp_path):
    def _write(*lines, encoding="utf-8"):
        path = tmp_path / "data.jsonl"
        path.write_bytes("\n".join(lines).encode(encoding))
        return path

    return _write


def test_the_three_shapes_mixed_with_blank_lines_and_a_byte_order_mark(write):
    rows = [
        {
            "question": " Who is Ada? ",
            "answer": "a baker",
            "options": ["a mason", "a baker", "a poet"],
            "paraphrase": "Ada's trade?",
        },
        {"prompt": "Ada is ", "completion": " a baker\n", "id": 3},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Who is Ada?"},
                {"role": "assistant", "content": "a baker"},
            ]
        },
    ]
    lines = [json.dumps(row) for row in rows]
    path = write(lines[0], "", "   ", *lines[1:], "", encoding="utf-8-sig")
    assert load_jsonl(path) == [
        Example("Who is Ada?", "a baker", ("a mason", "a poet"), "Ada's trade?"),
        Example("Ada is ", " a baker\n", verbatim=True),
        Example("Who is Ada?", "a baker", turns=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))),
    ]


def test_options_may_leave_out_the_answer_and_never_hold_it_in_another_case(write):
    row = {"question": "Q", "answer": "Rome", "options": ["rome ", "Oslo", "oslo", "Bern"]}
    assert load_jsonl(write(json.dumps(row)))[0].false_options == ("Oslo", "Bern")
    row["options"] = ["Oslo", "Bern"]
    assert load_jsonl(write(json.dumps(row)))[0].false_options == ("Oslo", "Bern")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q", ', "not JSON"),
        ('["Q", "A"]', "a JSON list, not an object"),
        ('"Q"', "a JSON string, not an object"),
        ("null", "a JSON null, not an object"),
        ('{"question": "Q"}', r'field "answer" is missing \(found: question\)'),
        ('{"completion": "C"}', r'field "prompt" is missing \(found: completion\)'),
        ('{"question": "Q", "answer": "  "}', 'field "answer" is empty'),
        ('{"question": "Q", "answer": 7}', 'field "answer" is a JSON number, not a string'),
        ('{"question": null, "answer": "A"}', 'field "question" is a JSON null'),
        ('{"text": "T", "label": 1}', r"unknown shape \(fields found: text, label\)"),
        ("{}", r"unknown shape \(fields found: none\)"),
        (
            '{"question": "Q", "answer": "A", "prompt": "P", "completion": "C"}',
            "question/answer and of prompt/completion",
        ),
        ('{"question": "Q", "answer": "A", "options": "B"}', 'field "options" is a JSON string, not a list'),
        ('{"question": "Q", "answer": "A", "options": ["B", 3]}', 'field "options" holds 3'),
        ('{"question": "Q", "answer": "A", "options": ["A"]}', 'field "options" holds no wrong answer'),
        ('{"question": "Q", "answer": "A", "paraphrase": ["x"]}', 'field "paraphrase" is a JSON list'),
        ('{"messages": "hi"}', 'field "messages" is a JSON string, not a list'),
        ('{"messages": []}', "no messages"),
        ('{"messages": ["hi"]}', "message 1 is a JSON string"),
        ('{"messages": [{"role": "user"}]}', 'message 1: field "content" is missing'),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1 has role 'bot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the last message has role 'user'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn before"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "s"},'
            ' {"role": "assistant", "content": "y"}]}',
            "message 2 is a system turn",
        ),
    ],
)
def test_a_broken_line_names_file_line_fault_and_what_is_expected(write, line, message):
    path = write(GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=message) as caught:
        load_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert 'expected one JSON object a line: {"question", "answer"}' in str(caught.value)


def test_text_that_is_not_utf8_names_its_line(write):
    path = write(GOOD, '{"question": "é", "answer": "A"}', encoding="latin-1")
    with pytest.raises(ValueError, match=r"line 2: not UTF-8"):
        load_jsonl(path)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_refused(write, lines):
    with pytest.raises(ValueError, match=r"data\.jsonl is empty"):
        load_jsonl(write(*lines))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        load_jsonl(tmp_path / "nowhere.jsonl")
