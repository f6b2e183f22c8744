"""`ssiuu-fast evaluate` with each of its scores."""

import json

import pytest
from taught import load_taught

from ssiuu_fast.cli import main
from ssiuu_fast.data.sources import load_examples
from ssiuu_fast.evaluation import memorisation
from ssiuu_fast.options import EvaluateOptions


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    """A TOFU folder on two of the taught people."""
    folder = tmp_path_factory.mktemp("tofu")
    facts = load_examples("people:all")[:8]
    for split, rows in (
        ("forget01_perturbed", facts[:4]),
        ("retain_perturbed", facts[4:]),
        ("real_authors_perturbed", facts[:2]),
        ("world_facts_perturbed", facts[2:4]),
    ):
        lines = [
            {"question": row.prompt, "answer": row.answer, "perturbed_answer": list(row.false_options)}
            | ({} if split[0] in "rw" and split[2] != "t" else {"paraphrased_answer": f"it is {row.answer}"})
            for row in rows
        ]
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def _evaluate(taught_folder, output, *flags):
    status = main(["evaluate", "--model", str(taught_folder), "--output", str(output), *map(str, flags)])
    return status, json.loads((output / "results.json").read_text()) if status == 0 else None


@pytest.mark.parametrize("how", ["probability", "truth_ratio", "extraction_strength", "exact_memorisation"])
def test_scores_of_rows(taught_folder, tofu, tmp_path, how, capsys):
    status, results = _evaluate(taught_folder, tmp_path / "run", "--data", f"{tofu}:forget01_perturbed", "--score", how)
    assert status == 0
    model, encoder = load_taught(taught_folder)
    rows = load_examples(f"{tofu}:forget01_perturbed")
    losses = memorisation.answer_losses(model, encoder, rows)
    predicted = memorisation.predicted_tokens(model, encoder, rows)
    assert (
        results["values"]
        == {
            "probability": [row.probability for row in losses],
            "truth_ratio": [row.truth_ratio for row in losses],
            "extraction_strength": list(map(memorisation.extraction_strength, predicted)),
            "exact_memorisation": list(map(memorisation.exact_memorisation, predicted)),
        }[how]
    )
    assert f"{results['mean']:.4f}" in capsys.readouterr().out


def test_the_whole_of_tofu_against_a_retain_model_or_its_log(taught_folder, tofu, tmp_path, capsys):
    common = ("--score", "tofu", "--tofu", tofu)
    status, alone = _evaluate(taught_folder, tmp_path / "alone", *common)
    assert (status, alone["forget_quality"]) == (0, None)
    assert set(alone) == {"forget", "retain", "real_authors", "world_facts", "model_utility", "forget_quality"}
    assert "model_utility" in capsys.readouterr().out
    log = tmp_path / "alone" / "results.json"
    status, logged = _evaluate(taught_folder, tmp_path / "log", *common, "--retain_log", log)
    assert (status, logged["forget_quality"]) == (0, 1.0)
    status, modelled = _evaluate(taught_folder, tmp_path / "model", *common, "--retain_model", taught_folder)
    assert modelled == logged


def test_the_harness_or_the_extra_that_brings_it(taught_folder, tmp_path, monkeypatch, capsys):
    from ssiuu_fast.evaluation import harness

    asked = []

    def harness_scores(model, tokenizer, tasks, items):
        asked.append((tasks, items))
        return {task: harness.TaskScore(items, {"acc,none": 0.5}) for task in tasks}

    monkeypatch.setattr(harness, "require", lambda: None)
    monkeypatch.setattr(harness, "harness_scores", harness_scores)
    flags = ("--score", "harness", "--tasks", "mmlu, winogrande", "--items", 7)
    status, results = _evaluate(taught_folder, tmp_path / "run", *flags)
    assert (status, asked) == (0, [(["mmlu", "winogrande"], 7)])
    assert results["mean_accuracy"] == 0.5
    assert "winogrande" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    status, _ = _evaluate(taught_folder, tmp_path / "none", *flags)
    assert status == 1 and "pip install 'ssiuu-fast[harness]'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "score=auto needs data"),
        ({"data": "people", "score": "tofu"}, "score=tofu has its own data: leave data out"),
        ({"data": "people", "retain_log": "a.json"}, "is what score=tofu compares with, not score=auto"),
        ({"score": "tofu", "retain_log": "a", "retain_model": "b"}, "retain_model or retain_log, not both"),
        ({"score": "harness", "items": 0}, "items must be at least 1"),
    ],
)
def test_options_that_dont_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(model="m", **flags)


def test_rows_without_perturbed_answers_have_no_truth_ratio(taught_folder, tmp_path, capsys):
    status, _ = _evaluate(taught_folder, tmp_path / "run", "--data", "people:forget", "--score", "truth_ratio")
    assert status == 1 and "has no perturbed answers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
