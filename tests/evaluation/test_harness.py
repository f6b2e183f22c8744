import json
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

from ssiuu_fast.evaluation import harness
from ssiuu_fast.models import new_llama, train_tokenizer


def _importable():
    try:
        harness.require()
    except ImportError:
        return False
    return True


QUESTIONS = [(f"Where is Bo, number {i}?", ["in Rome", "in Paris", "at home"], i % 3) for i in range(9)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer([f"{question} {' '.join(choices)}" for question, choices, _ in QUESTIONS], 300)
    model = new_llama(tokenizer, hidden_size=32, layers=2, heads=2, max_positions=96, initializer_range=0.3)
    return model, tokenizer


@pytest.fixture()
def task(tmp_path):
    rows = [{"q": question, "choices": choices, "label": label} for question, choices, label in QUESTIONS]
    (tmp_path / "where.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "where.yaml"
    file.write_text(
        f"""task: where
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "where.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    return str(file)


@pytest.mark.skipif(not _importable(), reason="lm-evaluation-harness isn't installed")
def test_a_local_task_through_the_harness(model_and_tokenizer, task):
    model, tokenizer = model_and_tokenizer
    model.train()
    score = harness.harness_scores(model, tokenizer, [task], items=7, batch_size=4)[task]
    assert model.training
    model.eval()
    assert score.items == 7
    right = [_likeliest(model, tokenizer, question, choices) == label for question, choices, label in QUESTIONS[:7]]
    assert score.metrics["acc,none"] == score.accuracy == pytest.approx(sum(right) / 7)
    assert 0 < sum(right) < 7
    with pytest.raises(ValueError, match="has no task 'nothing of the kind'"):
        harness.harness_scores(model, tokenizer, ["nothing of the kind"])


def _likeliest(model, tokenizer, question, choices):
    prompt = tokenizer(question)["input_ids"]
    sums = []
    for choice in choices:
        answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        sums.append(sum(log_probs[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)))
    return sums.index(max(sums))


def test_the_items_of_a_group_are_spread_over_its_members():
    mmlu = {f"m{i}": 100 + i for i in range(57)}
    spread = harness._first_items(mmlu, 500)
    assert sum(map(len, spread.values())) == 500
    assert {len(items) for items in spread.values()} == {8, 9}
    assert harness._first_items({"a": 3, "b": 100, "c": 5}, 50) == {
        "a": [0, 1, 2],
        "c": [0, 1, 2, 3, 4],
        "b": list(range(42)),
    }
    assert harness._first_items({"a": 3, "b": 4}, 50) == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}
    # the harness takes an empty list for all of a task
    assert harness._first_items({"a": 3, "b": 4}, 1) == {"a": [0], "b": [0]}


@pytest.fixture()
def stub(monkeypatch):
    """The harness's names that are used, with what they were called with."""
    calls = []

    def simple_evaluate(
        model,
        model_args=None,
        tasks=None,
        *,
        samples=None,
        task_manager=None,
        log_samples=True,
        bootstrap_iters=100000,
    ):
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        calls.append((model, tasks, samples))
        (task,) = tasks
        row = {"alias": task, "name": task, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}
        if task == "gsm8k":
            row = {"alias": task, "exact_match,flexible-extract": 0.3, "exact_match,strict-match": 0.25}
        return {"results": {task: row}}

    members = {"mmlu": {"mmlu_law": 30, "mmlu_art": 5}, "gsm8k": {"gsm8k": 100}, "sums": {"add": 3, "subtract": 3}}

    class TaskManager:
        def load(self, tasks):
            loaded = members[tasks[0]]
            return {
                "tasks": {name: SimpleNamespace(eval_docs=[0] * size) for name, size in loaded.items()},
                "groups": {"mmlu": None} if tasks == ["mmlu"] else {},
            }

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: options},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_what_the_harness_is_asked_and_what_is_taken_from_its_answer(model_and_tokenizer, stub):
    model, tokenizer = model_and_tokenizer
    drawn = []
    for _ in range(2):
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        if drawn:
            harness.harness_scores(model, tokenizer, ["gsm8k"])
            stub.clear()
        drawn.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]
    found = harness.harness_scores(model, tokenizer, ["mmlu", "gsm8k"], items=12, batch_size=3)
    assert found == {
        "mmlu": harness.TaskScore(12, {"acc,none": 0.5, "acc_norm,none": 0.75}),
        "gsm8k": harness.TaskScore(12, {"exact_match,flexible-extract": 0.3, "exact_match,strict-match": 0.25}),
    }
    assert [score.accuracy for score in found.values()] == [0.5, 0.25]
    wrapped, tasks, samples = stub[0]
    assert wrapped == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3}
    assert (tasks, {name: len(items) for name, items in samples.items()}) == (["mmlu"], {"mmlu_art": 5, "mmlu_law": 7})
    with pytest.raises(ValueError, match="has no task 'chess'"):
        harness.harness_scores(model, tokenizer, ["chess"])
    with pytest.raises(
        ValueError, match="sums is a tag of tasks that have no common score: name some of add, subtract"
    ):
        harness.harness_scores(model, tokenizer, ["sums"])
    with pytest.raises(ValueError, match="items=0"):
        harness.harness_scores(model, tokenizer, ["mmlu"], items=0)


def test_a_missing_harness_names_the_extra(model_and_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'ssiuu-fast\[harness\]'"):
        harness.harness_scores(*model_and_tokenizer)
