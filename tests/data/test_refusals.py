"""Refusals: what a file may hold, and who gets which."""

from pathlib import Path

import pytest

from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.data.refusals import DEFAULT_REFUSAL, RefusalRows, load_refusals

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu" / "idontknow.jsonl"


def encode(row, refusal):
    return Encoded([row, int(refusal)], [-100, int(refusal)])


def drawn(rows, seed=0, epochs=6, refusals=tuple("0123456789")):
    table = RefusalRows(encode, refusals, rows, seed=seed, epochs=epochs)
    return table, [[table.encoded[table.place(row, epoch)] for row in range(rows)] for epoch in range(epochs)]


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("\ufeffI don't know.\n\n  That is beyond me…  \r\nI don't know.\n", "utf-8")
    assert load_refusals(file) == ["I don't know.", "That is beyond me…", "I don't know."]


def test_files_that_hold_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such file; expected refusals, a plain line each"):
        load_refusals(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="empty is empty: expected refusals"):
        load_refusals(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"d\xe9sol\xe9")
    with pytest.raises(ValueError, match="not UTF-8 .* at byte 1"):
        load_refusals(tmp_path / "latin")


@pytest.mark.skipif(not TOFU.is_file(), reason="TOFU isn't here")
def test_the_refusals_of_tofu():
    refusals = load_refusals(TOFU)
    assert len(refusals) == 100
    assert all(isinstance(line, str) and line for line in refusals)


def test_every_row_has_its_own_question():
    _, epochs = drawn(5)
    for rows in epochs:
        assert [row.input_ids[0] for row in rows] == list(range(5))


def test_drawn_from_seed_epoch_and_row_alone():
    _, epochs = drawn(5)
    assert drawn(5)[1] == epochs
    # more epochs, more rows: the same for those that were there
    longer = drawn(8, epochs=9)[1]
    assert [rows[:5] for rows in longer[:6]] == epochs
    assert drawn(5, seed=1)[1] != epochs
    assert len({str(rows) for rows in epochs}) == 6
    assert len({row.input_ids[1] for rows in epochs for row in rows}) > 5


def test_every_refusal_comes_up_about_as_often():
    _, epochs = drawn(100, epochs=50)
    counts = [0] * 10
    for rows in epochs:
        for row in rows:
            counts[row.input_ids[1]] += 1
    assert all(abs(count - 500) < 110 for count in counts)


def test_every_pair_is_encoded_once():
    asked = []

    def counting(row, refusal):
        asked.append((row, refusal))
        return encode(row, refusal)

    table = RefusalRows(counting, ["1", "2", "1"], 3, seed=0, epochs=40)
    assert asked == [(row, refusal) for row in range(3) for refusal in ("1", "2")]
    assert len(table.encoded) == 6


def test_one_refusal_is_one_row_each():
    table = RefusalRows(lambda row, refusal: (row, refusal), [DEFAULT_REFUSAL], 3, seed=0, epochs=5)
    assert table.encoded == [(row, DEFAULT_REFUSAL) for row in range(3)]
    assert [table.place(row, 4) for row in range(3)] == [0, 1, 2]


def test_what_is_refused():
    with pytest.raises(ValueError, match="got the string 'no': write"):
        RefusalRows(encode, "no", 3, seed=0, epochs=1)
    with pytest.raises(ValueError, match="there are no refusals"):
        RefusalRows(encode, [], 3, seed=0, epochs=1)
    with pytest.raises(ValueError, match="epoch=6: refusals were drawn for epochs 0 to 5"):
        drawn(3)[0].place(0, 6)
