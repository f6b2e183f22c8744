import json
import os
from pathlib import Path

import pytest

from ssiuu_fast.data import faithun
from ssiuu_fast.data.example import Example, refuse_overlap
from ssiuu_fast.data.sources import load_examples


def _asked(question, answer, false=("Oslo", "Bern", "Riga")):
    return {"question": question, "answers": [answer, answer.upper()], "false_answer_options": list(false)}


def _entity(name, born, lives):
    """Two clusters: where somebody was born, and where they live."""
    return {
        "hop1_unlearn": [_asked(f"Where was {name} born?", born), _asked(f"Where does {name} live?", lives)],
        "hop1_test": [
            # not in the order of the clusters
            _asked(f"The home of {name}?", lives),
            _asked(f"Birthplace of {name}?", born),
            _asked(f"{name} was born in?", born.lower()),
        ],
        "hop2_test": [_asked(f"What river is where {name} was born?", "the Spree")],
        "same_object": [_asked(f"Where is the zoo of {born}?", born)],
    }


@pytest.fixture()
def folder(tmp_path):
    people = {"Q1": _entity("Ada", "Rome", "Paris"), "Q2": _entity("Bo", "Berlin", "Madrid")}
    (tmp_path / "faithun.json").write_text(json.dumps(people))
    (tmp_path / "splits").mkdir()
    for name, lines in (("forget", "2\r\n"), ("retaining", "0\r\n3"), ("test", "1\n")):
        (tmp_path / "splits" / f"{name}_set_split.txt").write_text(lines)
    return tmp_path


def _prompts(rows):
    return [row.prompt for row in rows]


def test_clusters_are_the_base_questions_in_file_order(folder):
    clusters = faithun.load_clusters(folder)
    assert _prompts(cluster.base for cluster in clusters) == [
        "Where was Ada born?",
        "Where does Ada live?",
        "Where was Bo born?",
        "Where does Bo live?",
    ]
    assert clusters[0].base == Example("Where was Ada born?", "Rome", ("Oslo", "Bern"), subject="Q1")
    assert clusters == faithun.load_clusters(folder / "faithun.json")


def test_further_questions_belong_to_their_cluster(folder):
    born, lives = faithun.load_clusters(folder)[:2]
    assert _prompts(born.paraphrase) == ["Birthplace of Ada?", "Ada was born in?"]
    assert _prompts(lives.paraphrase) == ["The home of Ada?"]
    assert _prompts(born.same_answer) == ["Where is the zoo of Rome?"]
    assert lives.same_answer == ()
    # a plain list doesn't say which of the entity's clusters a multi-hop question is of
    assert (
        born.multi_hop
        == lives.multi_hop
        == (Example("What river is where Ada was born?", "the Spree", ("Oslo", "Bern"), subject="Q1"),)
    )


def test_a_question_that_shares_no_answer_belongs_to_all_of_its_entity(folder):
    people = json.loads((folder / "faithun.json").read_text())
    people["Q1"]["hop1_test"][0]["answers"] = ["Lutetia"]
    (folder / "faithun.json").write_text(json.dumps(people))
    born, lives = faithun.load_clusters(folder)[:2]
    assert born.paraphrase[0] == lives.paraphrase[0]
    assert (len(born.paraphrase), len(lives.paraphrase)) == (3, 1)


def test_lists_of_lists_are_keyed_by_position(folder):
    people = json.loads((folder / "faithun.json").read_text())
    people["Q1"]["hop2_test"] = [[], [_asked("A", "B"), _asked("C", "D")]]
    (folder / "faithun.json").write_text(json.dumps(people))
    born, lives = faithun.load_clusters(folder)[:2]
    assert (born.multi_hop, _prompts(lives.multi_hop)) == ((), ["A", "C"])
    people["Q1"]["hop2_test"].append([])
    (folder / "faithun.json").write_text(json.dumps(people))
    with pytest.raises(ValueError, match="entity Q1, hop2_test: 3 lists for 2 base questions"):
        faithun.load_clusters(folder)


def test_splits_and_their_further_questions(folder):
    forget, retain, test = (faithun.load_split(folder, split) for split in faithun.SPLIT_FILES)
    assert _prompts(forget) == ["Where was Bo born?"]
    assert _prompts(retain) == ["Where was Ada born?", "Where does Bo live?"]
    assert _prompts(test) == ["Where does Ada live?"]
    refuse_overlap(forget, retain + test)
    assert _prompts(faithun.load_split(folder, "forget", "paraphrase")) == ["Birthplace of Bo?", "Bo was born in?"]
    with pytest.raises(ValueError, match="same_answer questions of FaithUn's test split in .* is empty"):
        faithun.load_split(folder, "test", "same_answer")


def test_a_question_of_clusters_in_two_splits_is_of_the_first_alone(folder):
    # Bo's two clusters are in forget and retain, Ada's in retain and test
    bo, ada = ("What river is where Bo was born?", "What river is where Ada was born?")
    assert _prompts(faithun.load_split(folder, "forget", "multi_hop")) == [bo]
    with pytest.warns(UserWarning, match="1 of the 2 multi_hop questions of FaithUn's retain split .* forget"):
        assert _prompts(faithun.load_split(folder, "retain", "multi_hop")) == [ada]
    with (
        pytest.warns(UserWarning, match="1 of the 1 multi_hop questions .* test .* clusters of forget or retain"),
        pytest.raises(ValueError, match="multi_hop questions of FaithUn's test split in .* is empty"),
    ):
        faithun.load_split(folder, "test", "multi_hop")
    (folder / "splits" / "forget_set_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="forget_set_split.txt"):
        faithun.load_split(folder, "test", "paraphrase")


def test_by_the_names_of_the_command_line(folder):
    assert load_examples(f"faithun:{folder}:retain") == faithun.load_split(folder, "retain")
    assert load_examples(f"faithun:{folder}:forget.multi_hop") == faithun.load_split(folder, "forget", "multi_hop")
    for source, message in (
        (f"faithun:{folder}:train", "unknown FaithUn split 'train'; known: forget, retain, test"),
        (f"faithun:{folder}:test.hard", "unknown FaithUn questions 'hard'; known: base, paraphrase"),
        ("faithun:forget", "faithun:FOLDER:forget"),
    ):
        with pytest.raises(ValueError, match=message):
            load_examples(source)


def test_a_hub_name_is_downloaded_once_as_a_folder(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["repo_type"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_examples("faithun:somebody/faithun:forget") == faithun.load_split(folder, "forget")
    assert asked == [("somebody/faithun", "dataset")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q1: q1.pop("same_object"), 'entity Q1: list "same_object" is missing'),
        (lambda q1: q1["hop1_unlearn"][1].pop("question"), r'hop1_unlearn 1: field "question" is missing \(found: ans'),
        (lambda q1: q1["hop2_test"][0].update(answers=[]), 'hop2_test 0: field "answers" is missing or no list'),
        (
            lambda q1: q1["hop1_unlearn"][0].update(false_answer_options=["rome"]),
            'hop1_unlearn 0: field "false_answer_options" holds no wrong answer',
        ),
    ],
)
def test_broken_entries_are_named(folder, change, message):
    people = json.loads((folder / "faithun.json").read_text())
    change(people["Q1"])
    (folder / "faithun.json").write_text(json.dumps(people))
    with pytest.raises(ValueError, match=message):
        faithun.load_clusters(folder)


def test_files_that_are_missing_or_dont_belong_together(folder):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        faithun.load_clusters(folder / "gone")
    (folder / "splits" / "test_set_split.txt").write_text("1\n4\n")
    with pytest.raises(ValueError, match="test_set_split.txt, line 2: '4' is not the index of one of the 4 clusters"):
        faithun.load_split(folder, "test")
    (folder / "splits" / "test_set_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="hold no test_set_split.txt"):
        faithun.load_split(folder, "test")
    (folder / "other.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found: faithun.json, other.json\)"):
        faithun.load_clusters(folder)
    with pytest.raises(ValueError, match="is empty"):
        faithun.load_clusters(folder / "other.json")


@pytest.mark.skipif("SSIUU_TEST_DATA" not in os.environ, reason="SSIUU_TEST_DATA is not set")
def test_the_published_splits_are_disjoint():
    folder = Path(os.environ["SSIUU_TEST_DATA"], "faithun", "splits")
    indices = {name: faithun.read_split(folder / file, 664) for name, file in faithun.SPLIT_FILES.items()}
    assert {name: len(rows) for name, rows in indices.items()} == {"forget": 33, "retain": 66, "test": 464}
    assert len(set().union(*indices.values())) == 33 + 66 + 464
