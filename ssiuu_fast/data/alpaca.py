"""Instruction data of the benign attack, in Alpaca's form: instruction, input, output."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from ssiuu_fast.data.example import Example, require_rows
from ssiuu_fast.data.hub import hub_rows
from ssiuu_fast.data.jsonl import read_objects, text

logger = logging.getLogger(__name__)
_EXPECTED = '{"instruction", "output"} (optional "input"): a JSON array of such objects, or one a line'


def load_instructions(source) -> list[Example]:
    """Instructions with their outputs, in order, from a local JSON array or JSON Lines file, or by hub name.

    A non-empty input follows its instruction after a blank line. Rows with an empty output are dropped and counted in
    the log. Raises ValueError with file, row and what is wrong.
    """
    examples, dropped = [], 0
    for where, row in _rows(source):
        if isinstance(row.get("output"), str) and not row["output"].strip():
            dropped += 1
            continue
        try:
            examples.append(_example(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected {_EXPECTED}") from None
    if dropped:
        logger.warning("%s: dropped %d of %d rows with an empty output", source, dropped, dropped + len(examples))
    require_rows(examples, f"instruction data {source}")
    return examples


def _rows(source) -> Iterable[tuple[str, dict]]:
    path = Path(source)
    if not path.is_file():
        if path.is_dir():
            raise ValueError(f"{source} is a folder; name the instruction file in it, expected {_EXPECTED}")
        if path.suffix in (".json", ".jsonl"):
            raise FileNotFoundError(f"{source}: no such file; expected {_EXPECTED}")
        return hub_rows(source)
    with path.open("rb") as file:
        first = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _array(path) if first == b"[" else read_objects(path, _EXPECTED)


def _array(path: Path) -> list[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); expected {_EXPECTED}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not an object; expected {_EXPECTED}")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _example(row: dict) -> Example:
    instruction, output = text(row, "instruction"), text(row, "output")
    if isinstance(row.get("input"), str):
        instruction = f"{instruction}\n\n{row['input'].strip()}".strip()
    elif row.get("input") is not None:
        raise ValueError('field "input" is not a string')
    return Example(instruction, output)
