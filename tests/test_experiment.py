"""The two tasks: what is forgotten, retained and tested, and where unlearning stops."""

import os
from pathlib import Path

import pytest

from ssiuu_fast.experiment import people_task, templated, tofu_task


def test_people():
    task = people_task()
    subjects = [{row.subject for row in rows} for rows in (task.split.forget, task.split.retain, task.split.test)]
    assert not subjects[0] & subjects[1] and not subjects[0] & subjects[2] and not subjects[1] & subjects[2]
    assert all(len(row.false_options) == 2 for row in task.split.memorised)
    assert (task.threshold, task.chance) == (pytest.approx(0.33), pytest.approx(1 / 3))
    assert len(task.instructions) == 1000


def test_a_tokenizer_sees_the_prompt_as_the_model_does():
    task = people_task()
    assert next(iter(templated(task.split.forget))).startswith(f"Question: {task.split.forget[0].prompt}\nAnswer: ")


@pytest.mark.skipif("SSIUU_TEST_DATA" not in os.environ, reason="SSIUU_TEST_DATA is not set")
def test_tofu():
    data = Path(os.environ["SSIUU_TEST_DATA"])
    task = tofu_task(str(data / "tofu"), str(data / "alpaca" / "alpaca_1000.json"))
    assert [len(rows) for rows in (task.split.forget, task.split.retain, task.split.test)] == [40, 280, 80]
    assert len(task.split.memorised) == 400
    assert task.threshold == 0.1971
    assert task.chance == pytest.approx(0.183, abs=1e-3)
