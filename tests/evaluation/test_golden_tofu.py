"""Another framework's logs of two 1B models on forget01, recomputed from the numbers and texts in them."""

import json
import os
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from ssiuu_fast.evaluation import tofu_metrics
from ssiuu_fast.evaluation.memorisation import Losses, exact_memorisation, extraction_strength
from ssiuu_fast.evaluation.scores import rouge_l_recall
from ssiuu_fast.evaluation.tofu_report import Metric, TofuReport, loss_metrics, read_truth_ratios

pytestmark = pytest.mark.skipif("SSIUU_TEST_DATA" not in os.environ, reason="SSIUU_TEST_DATA is not set")
FULL, RETAIN = "Llama-3.2-1B-Instruct_full_forget01", "Llama-3.2-1B-Instruct_retain99"
# our set -> the logs' name of it, and whether it has paraphrased answers
SETS = {
    "forget": ("forget", True),
    "retain": ("retain", True),
    "real_authors": ("ra", False),
    "world_facts": ("wf", False),
}
ROWS = {"forget": 40, "retain": 400, "real_authors": 100, "world_facts": 117}
EXACT = {"abs": 1e-9, "rel": 1e-9}


def _path(log):
    return Path(os.environ["SSIUU_TEST_DATA"], "tofu_logs", f"{log}.json")


@pytest.fixture(scope="module", params=[FULL, RETAIN])
def log(request):
    return json.loads(_path(request.param).read_text())


def _values(metric, field):
    rows = metric["value_by_index"]
    assert sorted(map(int, rows)) == list(range(len(rows)))
    return [rows[str(index)][field] for index in range(len(rows))]


def _truth_ratio(log, short):
    return log[f"{short}_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"]


def _losses(log, name):
    short, paraphrased = SETS[name]
    own = _values(log[f"{short}_Q_A_Prob"], "avg_loss")
    right = _values(log[f"{short}_Q_A_PARA_Prob"], "avg_loss") if paraphrased else [None] * len(own)
    wrong = _values(log[f"{short}_Q_A_PERT_Prob"], "avg_loss")
    return [Losses(a, p, tuple(w)) for a, p, w in zip(own, right, wrong, strict=True)]


@pytest.mark.parametrize("name", SETS)
def test_truth_ratios_are_functions_of_the_logged_losses(log, name):
    logged = _truth_ratio(log, SETS[name][0])
    ours = loss_metrics(name, _losses(log, name))["truth_ratio"]
    assert len(ours.values) == ROWS[name]
    assert ours.values == pytest.approx(_values(logged, "score"), **EXACT)
    assert ours.aggregate == pytest.approx(logged["agg_value"], **EXACT)


@pytest.mark.parametrize("name", SETS)
def test_probabilities_are_those_of_the_logged_losses(log, name):
    short, paraphrased = SETS[name]
    checked = 0
    for metric in ["Prob", "PERT_Prob", *(["PARA_Prob"] if paraphrased else [])]:
        logged = log[f"{short}_Q_A_{metric}"]
        losses, probabilities = (np.array(_values(logged, field)) for field in ("avg_loss", "prob"))
        ours = np.vectorize(tofu_metrics.probability)(losses)
        # the log rounded them to fp32 after an exponential in fp32: two units of its last place
        np.testing.assert_allclose(ours, probabilities, rtol=2 * 2**-23, atol=0)
        assert fmean(probabilities.reshape(len(losses), -1).mean(axis=1)) == pytest.approx(logged["agg_value"], **EXACT)
        checked += losses.size
    assert checked == ROWS[name] * (7 if paraphrased else 4)


@pytest.mark.parametrize("name", ["real_authors", "world_facts"])
def test_normalised_probabilities(log, name):
    short, _ = SETS[name]
    right, wrong = (_values(log[f"{short}_Q_A_{metric}"], "prob") for metric in ("Prob", "PERT_Prob"))
    logged = log[f"{short}_Q_A_Prob_normalised"]
    ours = [tofu_metrics.normalised_probability(p, w) for p, w in zip(right, wrong, strict=True)]
    assert ours == pytest.approx(_values(logged, "prob"), **EXACT)
    assert fmean(ours) == pytest.approx(logged["agg_value"], **EXACT)
    # from the losses, which aren't rounded twice
    from_losses = loss_metrics(name, _losses(log, name))["probability"]
    assert from_losses.values == pytest.approx(_values(logged, "prob"), rel=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_rouge_l_recall_of_each_generation(log, name):
    logged = log[f"{SETS[name][0]}_Q_A_ROUGE"]
    texts = zip(_values(logged, "generation"), _values(logged, "ground_truth"), strict=True)
    ours = [rouge_l_recall(generation, truth) for generation, truth in texts]
    assert len(ours) == ROWS[name]
    assert ours == pytest.approx(_values(logged, "rougeL_recall"), **EXACT)
    assert fmean(ours) == pytest.approx(logged["agg_value"], **EXACT)


def test_model_utility(log):
    """From the logged losses, probabilities and texts on, with nothing that the log aggregated."""
    sets = {}
    for name, (short, paraphrased) in SETS.items():
        own, wrong = (_values(log[f"{short}_Q_A_{metric}"], "prob") for metric in ("Prob", "PERT_Prob"))
        if not paraphrased:
            own = [tofu_metrics.normalised_probability(p, w) for p, w in zip(own, wrong, strict=True)]
        rouge = log[f"{short}_Q_A_ROUGE"]
        texts = zip(_values(rouge, "generation"), _values(rouge, "ground_truth"), strict=True)
        sets[name] = {
            "probability": Metric(own, fmean(own)),
            "rouge_l_recall": Metric([], fmean(rouge_l_recall(generation, truth) for generation, truth in texts)),
            "truth_ratio": loss_metrics(name, _losses(log, name))["truth_ratio"],
        }
    assert TofuReport(sets, None).model_utility == pytest.approx(log["model_utility"]["agg_value"], **EXACT)


def test_forget_quality_of_the_model_that_knows_all():
    ours = tofu_metrics.forget_quality(read_truth_ratios(_path(FULL)), read_truth_ratios(_path(RETAIN)))
    assert ours == pytest.approx(json.loads(_path(FULL).read_text())["forget_quality"]["agg_value"], abs=0, rel=1e-9)


def test_memorisation(log):
    """The logs don't say which tokens were predicted, but how many of n, and how many of them at the end.

    So this checks the arithmetic and the least value alone: which tokens are predicted is made up to fit.
    """
    exact, strength = (log[name] for name in ("exact_memorization", "extraction_strength"))
    pairs = list(zip(_values(exact, "score"), _values(strength, "score"), strict=True))
    predicted = [_predicted(*pair) for pair in pairs]
    # also of the model that was never taught, which hardly writes an answer to its end: the least is one token's share
    assert min(written for _, written in pairs) > 0
    # logged in fp32
    assert list(map(exact_memorisation, predicted)) == pytest.approx([matched for matched, _ in pairs], rel=2e-7)
    assert list(map(extraction_strength, predicted)) == pytest.approx([written for _, written in pairs], **EXACT)
    assert fmean(map(exact_memorisation, predicted)) == pytest.approx(exact["agg_value"], rel=1e-7)
    assert fmean(map(extraction_strength, predicted)) == pytest.approx(strength["agg_value"], **EXACT)


def _predicted(matched, written):
    n = next(n for n in range(1, 120) if all(abs(share * n - round(share * n)) < 1e-5 for share in (matched, written)))
    at_the_end, before = round(written * n), round((matched - written) * n)
    missed = n - at_the_end - before
    assert missed >= (at_the_end < n)
    return [True] * before + [False] * missed + [True] * at_the_end
