"""The user's own data: JSON Lines with question/answer, prompt/completion or messages."""

import json
from collections.abc import Iterator
from pathlib import Path

from ssiuu_fast.data.example import Example

EXPECTED = (
    'one JSON object a line: {"question", "answer"} (optional "options", "paraphrase"), '
    '{"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}'
)
_SHAPES = (("messages",), ("question", "answer"), ("prompt", "completion"))
_ROLES = ("system", "user", "assistant")


def load_jsonl(path) -> list[Example]:
    """The rows of a UTF-8 JSON Lines file, in order; rows of different shapes may be mixed, blank lines are skipped.

    question/answer     asked through the encoder's template.
    prompt/completion   joined as they stand, no template.
    messages            a chat that ends with an assistant turn, which is the answer.

    `options` may hold the right answer or only wrong ones; it is kept without the right one. `paraphrase` is the same
    question in other words. Raises ValueError with file, line number, what is wrong and what is expected.
    """
    examples = []
    for where, row in read_objects(path, EXPECTED):
        try:
            examples.append(example_from(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected {EXPECTED}") from None
    return examples


def read_objects(path, expected: str) -> Iterator[tuple[str, dict]]:
    """("file, line n", object) of each line of a JSON Lines file; ValueError names a broken line or an empty file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    empty = True
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not line:
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); expected {expected}"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON {_kind(row)}, not an object; expected {expected}")
            empty = False
            yield where, row
    if empty:
        raise ValueError(f"{path} is empty: it has no rows; expected {expected}")


def text(row: dict, name: str, *, strip: bool = True) -> str:
    """The non-empty string `row[name]`; ValueError says if it is missing, of another type, or empty."""
    if name not in row:
        raise ValueError(f'field "{name}" is missing (found: {", ".join(row) or "no fields"})')
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f'field "{name}" is a JSON {_kind(value)}, not a string')
    if not value.strip():
        raise ValueError(f'field "{name}" is empty')
    return value.strip() if strip else value


def false_options(options, answer: str) -> tuple[str, ...]:
    """The options without the right answer and without repeats; case and surrounding space don't count in comparing."""
    seen = {answer.strip().casefold()}
    wrong = []
    for option in options:
        if option.strip().casefold() not in seen:
            seen.add(option.strip().casefold())
            wrong.append(option)
    return tuple(wrong)


def example_from(row: dict) -> Example:
    """The example of one row in the forms of `load_jsonl`. Raises ValueError for one that has none of them."""
    shape = _shape(row)
    if shape == ("messages",):
        return _chat(row)
    verbatim = shape == ("prompt", "completion")
    # a verbatim row's spaces and line ends are part of what the user wants trained
    prompt, answer = (text(row, name, strip=not verbatim) for name in shape)
    return Example(prompt, answer, _options(row, answer, verbatim), _paraphrase(row), verbatim=verbatim)


def _shape(row: dict) -> tuple[str, ...]:
    complete = [shape for shape in _SHAPES if all(name in row for name in shape)]
    if len(complete) > 1:
        raise ValueError(f"fields of {' and of '.join('/'.join(shape) for shape in complete)} in one row")
    if complete:
        return complete[0]
    begun = [shape for shape in _SHAPES if any(name in row for name in shape)]
    if begun:
        return begun[0]
    raise ValueError(f"unknown shape (fields found: {', '.join(row) or 'none'})")


def _chat(row: dict) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError(f'field "messages" is a JSON {_kind(messages)}, not a list')
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is a JSON {_kind(message)}, not an object with role and content")
        try:
            role, content = text(message, "role"), text(message, "content")
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        if role not in _ROLES:
            raise ValueError(f"message {number} has role {role!r}, not one of {', '.join(_ROLES)}")
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is a system turn; only the first message may be one")
        turns.append((role, content))
    if not turns or turns[-1][0] != "assistant":
        last = f"the last message has role {turns[-1][0]!r}" if turns else "no messages"
        raise ValueError(f"{last}; a chat ends with an assistant turn, the answer")
    if len(turns) < 2 or turns[-2][0] != "user":
        raise ValueError("no user turn before the last assistant turn, which answers it")
    (_, prompt), (_, answer) = turns[-2:]
    return Example(prompt, answer, _options(row, answer, False), _paraphrase(row), turns=tuple(turns[:-2]))


def _options(row: dict, answer: str, verbatim: bool) -> tuple[str, ...]:
    options = row.get("options")
    if options is None:
        return ()
    if not isinstance(options, list):
        raise ValueError(f'field "options" is a JSON {_kind(options)}, not a list of strings')
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise ValueError(f'field "options" holds {option!r}, not a non-empty string')
    wrong = false_options(options if verbatim else [option.strip() for option in options], answer)
    if not wrong:
        raise ValueError('field "options" holds no wrong answer; leave it out or add one')
    return wrong


def _paraphrase(row: dict) -> str | None:
    return None if row.get("paraphrase") is None else text(row, "paraphrase")


def _kind(value) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]
