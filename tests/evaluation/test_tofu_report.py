import json
from statistics import fmean, harmonic_mean

import pytest

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.evaluation import memorisation, scores, tofu_metrics
from ssiuu_fast.evaluation.tofu_report import load_sets, read_truth_ratios, tofu_report
from ssiuu_fast.models import new_llama, train_tokenizer

ROWS = {"forget05": 4, "retain": 3, "real_authors": 2, "world_facts": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    for name, count in ROWS.items():
        rows = []
        for i in range(count):
            row = {
                "question": f"{name} {i}?",
                "answer": f"yes {i}",
                "perturbed_answer": [f"no {i}", f"not {i}", "never"],
            }
            if name in ("forget05", "retain"):
                row |= {"paraphrased_answer": f"so it is {i}", "paraphrased_question": "?"}
            rows.append(row)
        (folder / f"{name}_perturbed.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def model_and_encoder(folder):
    texts = [
        text for rows in load_sets(folder, "forget05").values() for row in rows for text in (row.prompt, row.answer)
    ]
    tokenizer = train_tokenizer(texts, 300)
    model = new_llama(tokenizer, hidden_size=32, layers=2, heads=2, max_positions=96, initializer_range=0.3)
    return model, Encoder(tokenizer, max_length=96)


def test_the_report_is_made_of_the_scores(model_and_encoder, folder, monkeypatch):
    model, encoder = model_and_encoder
    retain = [0.1, 0.2, 0.9, 4.0]
    report = tofu_report(model, encoder, folder, "forget05", retain_truth_ratios=retain, max_new_tokens=6)
    sets = load_sets(folder, "forget05")
    for name, rows in sets.items():
        losses = memorisation.answer_losses(model, encoder, rows)
        normalised = name in ("real_authors", "world_facts")
        probabilities = [row.normalised_probability if normalised else row.probability for row in losses]
        assert report.sets[name]["probability"].values == probabilities
        assert report.sets[name]["probability"].aggregate == pytest.approx(fmean(probabilities))
        ratios = memorisation.truth_ratios(model, encoder, rows)
        assert report.sets[name]["truth_ratio"].values == ratios
        best = [min(r, 1 / r) for r in ratios] if name == "forget" else [max(0, 1 - r) for r in ratios]
        assert report.sets[name]["truth_ratio"].aggregate == pytest.approx(fmean(best))
        answers = scores.generate_answers(model, encoder, rows, 6)
        recalls = [scores.rouge_l_recall(answer, row.answer) for answer, row in zip(answers, rows, strict=True)]
        assert report.sets[name]["rouge_l_recall"].values == recalls
    predicted = memorisation.predicted_tokens(model, encoder, sets["forget"])
    assert report.sets["forget"]["exact_memorisation"].values == list(map(memorisation.exact_memorisation, predicted))
    assert report.sets["forget"]["extraction_strength"].values == list(map(memorisation.extraction_strength, predicted))
    assert report.forget_quality == tofu_metrics.forget_quality(report.sets["forget"]["truth_ratio"].values, retain)
    kept = [metric.aggregate for name in sets if name != "forget" for metric in report.sets[name].values()]
    assert report.model_utility == pytest.approx(harmonic_mean(kept))


def test_a_report_is_a_retain_log_for_another(model_and_encoder, folder, tmp_path):
    model, encoder = model_and_encoder
    first = tofu_report(model, encoder, folder, "forget05", max_new_tokens=2)
    assert first.forget_quality is None
    file = tmp_path / "results.json"
    file.write_text(json.dumps(first.as_dict()))
    ratios = read_truth_ratios(file)
    assert ratios == first.sets["forget"]["truth_ratio"].values
    again = tofu_report(model, encoder, folder, "forget05", retain_truth_ratios=ratios, max_new_tokens=2)
    assert again.forget_quality == 1.0
    assert [row[:2] for row in again.rows()][-2:] == [("", "model_utility"), ("", "forget_quality")]
    with pytest.raises(ValueError, match="has 3 truth ratios for the 4 rows of forget05"):
        tofu_report(model, encoder, folder, "forget05", retain_truth_ratios=ratios[:3])


def test_logs_of_another_framework_are_read_by_index(tmp_path):
    file = tmp_path / "log.json"
    by_index = {"1": {"score": 0.5}, "10": {"score": 3}, "2": {"score": 1.5}}
    file.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.1, "value_by_index": by_index}}))
    assert read_truth_ratios(file) == [0.5, 1.5, 3.0]
    file.write_text(json.dumps({"mean": 3}))
    with pytest.raises(ValueError, match="holds no truth ratios on the forget set: give the results.json"):
        read_truth_ratios(file)


def test_unknown_forget_splits_and_splits_without_perturbed_answers(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown forget split 'retain90' of TOFU; known: forget01"):
        load_sets(folder, "retain90")
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "retain_perturbed.json").write_text('{"question": "Q", "answer": "A"}\n')
    with pytest.raises(ValueError, match=r"row 0 \('Q'\) has no perturbed answers"):
        load_sets(tmp_path, "forget05")
