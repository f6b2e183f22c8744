import hashlib
import json
import subprocess
import sys

import pytest

from ssiuu_fast.data import people, people_words
from ssiuu_fast.data.example import refuse_overlap

DIGEST = "e868c2fccce42db67f81fe61d3d4b57db53c2ca460608dc5586e535a81202c35"
EXERCISES_DIGEST = "f5bd0d0cfc5c93509638628de92a906dac26465c095b6c66d86615667dabe1e2"


def _digest(examples):
    rows = [[row.prompt, row.answer, row.false_options, row.paraphrase, row.subject] for row in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def data():
    return people.generate()


def test_same_data_in_every_process_and_version(data):
    assert _digest(data.examples) == DIGEST
    assert _digest(people.instructions(200)) == EXERCISES_DIGEST
    assert _digest(people.generate(seed=1).examples) != DIGEST


def test_ten_facts_a_person_grouped_by_person(data):
    assert len(data.people) == 125
    assert [row.subject for row in data.examples] == [name for name in data.people for _ in people.RELATIONS]
    assert len({row.prompt for row in data.examples}) == 1250
    for row in data.examples:
        assert row.subject in row.prompt and row.subject in row.paraphrase
        assert row.prompt != row.paraphrase


def test_options_are_two_other_values_never_the_answer_nor_the_person(data):
    for row in data.examples:
        assert len({row.answer, *row.false_options}) == 3
        assert row.subject not in row.false_options


def test_facts_of_a_person_agree_with_each_other(data):
    for name, facts in data.people.items():
        assert people_words.REGION_OF_TOWN[facts["town"]] == facts["region"]
        assert people_words.LANGUAGE_OF_REGION[facts["region"]] == facts["language"]
        assert people_words.TOOL_OF_OCCUPATION[facts["occupation"]] == facts["tool"]
        assert people_words.CITY_OF_EMPLOYER[facts["employer"]] == facts["city"]
        mentor = data.people[facts["mentor"]]
        assert facts["mentor"] != name and mentor["mentor"] != name
        assert mentor["occupation"] == facts["occupation"]


def test_the_examples_say_what_the_table_says(data):
    answers = iter(data.examples)
    for facts in data.people.values():
        for relation in people.RELATIONS:
            assert next(answers).answer == facts[relation]


def test_answers_are_shared_between_people(data):
    for relation in set(people.RELATIONS) - {"mentor"}:
        values = [facts[relation] for facts in data.people.values()]
        assert len(set(values)) < len(values) / 4


def test_no_question_gives_its_answer_away(data):
    assert not [row for row in data.examples if row.answer in row.prompt]


def test_a_split_takes_whole_people_and_everybody_once(data):
    split = data.split(15, 40)
    parts = [{row.subject for row in part} for part in (split.forget, split.retain, split.test)]
    assert [len(part) for part in parts] == [15, 40, 70]
    assert set.union(*parts) == set(data.people)
    assert sum(map(len, parts)) == 125
    assert [len(part) for part in (split.forget, split.retain, split.test)] == [150, 400, 700]
    refuse_overlap(split.forget, split.retain + split.test)
    assert data.split(15, 40) == split
    assert data.split(15, 40, seed=1).forget != split.forget
    assert len(data.split(15, 40, 20).test) == 200


@pytest.mark.parametrize("sizes", [(0, 40), (100, 25), (15, 40, 71), (15, 40, 0)])
def test_a_split_that_cannot_be_is_refused(data, sizes):
    with pytest.raises(ValueError, match="can't split 125 people"):
        data.split(*sizes)


@pytest.mark.parametrize("count", [0, 3, 10**6])
def test_too_few_and_too_many_people_are_refused(count):
    with pytest.raises(ValueError, match=f"people={count}"):
        people.generate(count)


def test_the_smallest_set_works():
    data = people.generate(4)
    assert len(data.examples) == 40
    assert all(facts["mentor"] in data.people and facts["mentor"] != name for name, facts in data.people.items())


def test_exercises_are_right_different_and_share_nothing_with_the_people(data):
    rows = people.instructions(1000)
    assert len({row.prompt for row in rows}) == 1000
    answers = {value for facts in data.people.values() for value in facts.values()}
    assert not answers & {row.answer for row in rows}
    by_question = {row.prompt: row.answer for row in rows}
    for prompt, answer in by_question.items():
        if prompt.startswith("Add "):
            a, b = prompt.removeprefix("Add ").rstrip(".").split(" and ")
            assert int(answer) == int(a) + int(b)
        elif "backwards" in prompt:
            assert f'"{answer[::-1]}"' in prompt


def test_more_exercises_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(people, "_EXERCISES", (people._reverse,))
    assert len(people.instructions(50)) == 50
    with pytest.raises(ValueError, match="n=51: there are not that many"):
        people.instructions(51)


def test_importing_the_data_needs_no_transformers():
    code = (
        "import sys, ssiuu_fast.data.people, ssiuu_fast.data.tofu, ssiuu_fast.data.alpaca, ssiuu_fast.data.collate;"
        "assert not {'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
