"""TOFU's whole evaluation of a model: forget quality, model utility, and the scores they are made of."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ssiuu_fast.data import tofu
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation import tofu_metrics
from ssiuu_fast.evaluation.generation import generate_answers
from ssiuu_fast.evaluation.memorisation import (
    Losses,
    answer_losses,
    exact_memorisation,
    extraction_strength,
    predicted_tokens,
    require_perturbed,
)
from ssiuu_fast.evaluation.scores import rouge_l_recall

FORGET_SPLITS = ("forget01", "forget05", "forget10")
KEPT = {"retain": "retain_perturbed", "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
PROBABILITY, ROUGE, TRUTH_RATIO = "probability", "rouge_l_recall", "truth_ratio"
EXTRACTION, EXACT = "extraction_strength", "exact_memorisation"


@dataclass(frozen=True)
class Metric:
    """A score of each row, and what it is of the set: the mean, or the aggregate that a truth ratio has."""

    values: list[float]
    aggregate: float


@dataclass(frozen=True)
class TofuReport:
    """sets: forget, retain, real_authors, world_facts → name of a score → Metric.

    probability of real authors and world facts is normalised over their perturbed answers. forget_quality is None
    without a retain model's truth ratios.
    """

    sets: dict[str, dict[str, Metric]]
    forget_quality: float | None

    @property
    def model_utility(self) -> float:
        """`tofu_metrics.model_utility` of the three sets that are to be kept."""
        parts = [self.sets[name][score].aggregate for name in KEPT for score in (PROBABILITY, ROUGE, TRUTH_RATIO)]
        return tofu_metrics.model_utility(parts)

    def as_dict(self) -> dict:
        """For JSON; `read_truth_ratios` takes a file of it."""
        sets = {name: {score: asdict(metric) for score, metric in scores.items()} for name, scores in self.sets.items()}
        return sets | {"model_utility": self.model_utility, "forget_quality": self.forget_quality}

    def rows(self) -> list[tuple[str, str, float | None]]:
        """(set, score, aggregate) of everything, the two summaries last."""
        found = [
            (name, score, metric.aggregate) for name, scores in self.sets.items() for score, metric in scores.items()
        ]
        return [*found, ("", "model_utility", self.model_utility), ("", "forget_quality", self.forget_quality)]


def tofu_report(
    model,
    encoder: Encoder,
    source,
    forget: str = "forget01",
    *,
    retain_truth_ratios: Sequence[float] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 200,
    progress: bool = False,
) -> TofuReport:
    """Scores a model on the perturbed splits of TOFU, in a folder or by hub name.

    forget: forget01, forget05 or forget10. retain_truth_ratios: those on this forget set of a model that never saw it
    (`memorisation.truth_ratios`, `read_truth_ratios`). In several processes every rank calls and has the report.
    """
    sets = load_sets(source, forget)
    if retain_truth_ratios is not None and len(retain_truth_ratios) != len(sets["forget"]):
        raise ValueError(
            f"the retain model has {len(retain_truth_ratios)} truth ratios for the {len(sets['forget'])} rows of "
            f"{forget}: is it a log of another forget set?"
        )
    found = {}
    for name, rows in sets.items():
        losses = answer_losses(model, encoder, rows, batch_size, progress)
        answers = generate_answers(model, encoder, rows, max_new_tokens, batch_size, progress)
        recalls = [rouge_l_recall(answer, row.answer) for answer, row in zip(answers, rows, strict=True)]
        found[name] = loss_metrics(name, losses) | {ROUGE: _averaged(recalls)}
    predicted = predicted_tokens(model, encoder, sets["forget"], batch_size, progress)
    found["forget"] |= {
        EXTRACTION: _averaged(list(map(extraction_strength, predicted))),
        EXACT: _averaged(list(map(exact_memorisation, predicted))),
    }
    quality = None
    if retain_truth_ratios is not None:
        quality = tofu_metrics.forget_quality(found["forget"][TRUTH_RATIO].values, retain_truth_ratios)
    return TofuReport(found, quality)


def load_sets(source, forget: str = "forget01") -> dict[str, list[Example]]:
    """The rows that `tofu_report` scores, by the names of its sets."""
    if forget not in FORGET_SPLITS:
        raise ValueError(f"unknown forget split {forget!r} of TOFU; known: {', '.join(FORGET_SPLITS)}")
    splits = {"forget": f"{forget}_perturbed"} | KEPT
    sets = {name: tofu.load_split(source, split) for name, split in splits.items()}
    for rows in sets.values():
        require_perturbed(rows)
    return sets


def loss_metrics(name: str, losses: Sequence[Losses]) -> dict[str, Metric]:
    """Probability and truth ratio of the set of this name."""
    normalised = name in ("real_authors", "world_facts")
    ratios = [row.truth_ratio for row in losses]
    of_set = tofu_metrics.truth_ratio_of_forgotten if name == "forget" else tofu_metrics.truth_ratio_of_kept
    probabilities = [row.normalised_probability if normalised else row.probability for row in losses]
    return {PROBABILITY: _averaged(probabilities), TRUTH_RATIO: Metric(ratios, of_set(ratios))}


def read_truth_ratios(path) -> list[float]:
    """The truth ratios on the forget set in a results file: of `TofuReport.as_dict`, or of OpenUnlearning's logs."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        if "forget_truth_ratio" in content:
            by_index = content["forget_truth_ratio"]["value_by_index"]
            return [float(by_index[index]["score"]) for index in sorted(by_index, key=int)]
        return [float(value) for value in content["forget"][TRUTH_RATIO]["values"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{path} holds no truth ratios on the forget set: give the results.json of `evaluate --score tofu`, or an "
            'evaluation log of OpenUnlearning with "forget_truth_ratio"'
        ) from None


def _averaged(values: list[float]) -> Metric:
    return Metric(values, sum(values) / len(values))
