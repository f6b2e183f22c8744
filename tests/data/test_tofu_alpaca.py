import json
import logging
import os
from pathlib import Path

import pytest

from ssiuu_fast.data import alpaca, tofu
from ssiuu_fast.data.example import Example, refuse_overlap

real_data = pytest.mark.skipif("SSIUU_TEST_DATA" not in os.environ, reason="SSIUU_TEST_DATA is not set")


def _data(*parts):
    return Path(os.environ["SSIUU_TEST_DATA"], *parts)


@pytest.fixture()
def folder(tmp_path):
    def write(split, rows):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))

    author_rows = [{"question": f"Q{i}?", "answer": f"A{i}."} for i in range(4000)]
    write("forget01", author_rows[3960:])
    write("retain99", author_rows[:3960])
    write(
        "real_authors",
        [{"question": "Who?", "answer": "B", "option1": "A", "option2": "B", "option3": "C", "option4": "D"}],
    )
    write(
        "forget05_perturbed",
        [
            {
                "question": "Q",
                "answer": "A",
                "paraphrased_question": "P",
                "paraphrased_answer": "B",
                "perturbed_answer": ["X", "X"],
            }
        ]
        * 21,
    )
    return tmp_path


def test_subjects_options_and_paraphrases(folder):
    forget = tofu.load_split(folder, "forget01")
    assert [row.subject for row in forget] == ["198"] * 20 + ["199"] * 20
    assert tofu.load_split(folder, "real_authors") == [Example("Who?", "B", ("A", "C", "D"))]
    perturbed = tofu.load_split(folder, "forget05_perturbed")
    assert perturbed[0] == Example(
        "Q", "A", paraphrase="P", subject="190", paraphrased_answer="B", perturbed_answers=("X", "X")
    )
    assert perturbed[20].subject == "191"


def test_unknown_split_lists_the_known_ones(folder):
    with pytest.raises(ValueError, match="unknown TOFU split 'forget02'; known: full, forget01"):
        tofu.load_split(folder, "forget02")


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"full\.json: no such file"):
        tofu.load_split(folder, "full")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        tofu.load_split(folder / "nowhere", "full")


def test_a_broken_row_names_file_and_line(folder):
    (folder / "full.json").write_text('{"question": "Q", "answer": "A"}\n{"question": "Q"}\n')
    with pytest.raises(ValueError, match=r'full\.json, line 2: field "answer" is missing'):
        tofu.load_split(folder, "full")
    (folder / "full.json").write_text('{"question": "Q", "answer": "A", "perturbed_answer": "B"}\n')
    with pytest.raises(ValueError, match="full.json, line 1: field \"perturbed_answer\" is 'B', not a list"):
        tofu.load_split(folder, "full")


def test_a_subset_takes_whole_authors(folder):
    part = tofu.subset(folder, 280, 80)
    assert (len(part.forget), len(part.retain), len(part.test), len(part.memorised)) == (40, 280, 80, 400)
    authors = [{row.subject for row in rows} for rows in (part.forget, part.retain, part.test)]
    assert [len(names) for names in authors] == [2, 14, 4]
    assert len(set.union(*authors)) == 20
    refuse_overlap(part.forget, part.retain + part.test)
    assert tofu.subset(folder, 280, 80) == part
    assert tofu.subset(folder, 280, 80, seed=1) != part


@pytest.mark.parametrize(
    ("rows", "message"),
    [((10, 80), "retain_train=10"), ((280, 0), "retain_test=0"), ((3940, 40), "need 199 authors; retain99 has 198")],
)
def test_a_subset_of_part_authors_or_too_many_is_refused(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        tofu.subset(folder, *rows)


def test_a_hub_name_goes_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [{"question": "Q", "answer": "A"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tofu.load_split("locuslab/TOFU", "forget10") == [Example("Q", "A", subject="180")]
    assert asked == [(("locuslab/TOFU", "forget10"), {"split": "train"})]


@real_data
def test_the_published_splits():
    full = tofu.load_split(_data("tofu"), "full")
    assert [row for row in full if int(row.subject) >= 198] == tofu.load_split(_data("tofu"), "forget01")
    for split in tofu.SPLITS:
        rows = tofu.load_split(_data("tofu"), split)
        assert all(len(row.false_options) == (3 if split in ("real_authors", "world_facts") else 0) for row in rows)
        # options are multiple choice, perturbed answers are for the truth ratio: a row has one of them or neither
        perturbed = {"real": 3, "worl": 3}.get(split[:4], 5) if split.endswith("perturbed") else 0
        assert {len(row.perturbed_answers) for row in rows} == {perturbed}
        assert all((row.paraphrased_answer is not None) == (perturbed == 5) for row in rows)
    assert len(tofu.subset(_data("tofu")).memorised) == 400


@pytest.mark.parametrize("lines", [False, True])
def test_instructions_from_an_array_or_from_lines(tmp_path, caplog, lines):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say nothing.", "output": " "},
    ]
    path = tmp_path / "instructions.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    with caplog.at_level(logging.WARNING):
        assert alpaca.load_instructions(path) == [Example("Add.\n\n1 and 2", "3"), Example("Say hi.", "hi")]
    assert "dropped 1 of 3 rows with an empty output" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"instruction": "I"}]', r'row 1: field "output" is missing'),
        ('[{"instruction": "I", "output": "O"}, 3]', "row 2: not an object"),
        ('[{"instruction": "I", "output": "O", "input": 3}]', 'row 1: field "input" is not a string'),
        ('[{"instruction": "I",\n "output"}]', "line 2: not JSON"),
        ("[]", "is empty"),
        ("", "is empty"),
        ('[{"instruction": "I", "output": ""}]', "is empty"),
    ],
)
def test_broken_instruction_files(tmp_path, text, message):
    path = tmp_path / "instructions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        alpaca.load_instructions(path)
    assert str(path) in str(caught.value)


def test_missing_instruction_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file"):
        alpaca.load_instructions("gone.json")
    with pytest.raises(ValueError, match="is a folder"):
        alpaca.load_instructions(tmp_path)


@real_data
def test_the_alpaca_sample():
    rows = alpaca.load_instructions(_data("alpaca", "alpaca_1000.json"))
    assert len(rows) == 1000
    assert rows[1].prompt.endswith("voice instead.\n\nThe president delivered a speech yesterday.")
