"""What `evaluate` scores a model by: each choice of --score, prepared first, so that what is wrong is said early."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example
from ssiuu_fast.data.sources import load_examples
from ssiuu_fast.evaluation import harness, memorisation, scores
from ssiuu_fast.evaluation.tofu_report import load_sets, read_truth_ratios, tofu_report
from ssiuu_fast.options import EvaluateOptions


@dataclass(frozen=True)
class Scored:
    """results: for JSON; header and lines: a table of what matters in them."""

    results: dict
    header: list[str]
    lines: list[list[str]]


# of the model and its encoder
Scoring = Callable[..., Scored]


def prepare(options: EvaluateOptions, load: Callable[[str], tuple]) -> Scoring:
    """The scoring that the options ask for. load: (model, encoder) of a place, for a retain model."""
    if options.score == "tofu":
        return _tofu(options, load)
    if options.score == "harness":
        return _harness(options)
    return _rows(options)


def _rows(options: EvaluateOptions) -> Scoring:
    rows = load_examples(options.data)
    if options.score == "truth_ratio":
        memorisation.require_perturbed(rows)

    def scoring(model, encoder: Encoder) -> Scored:
        kind, values = _values(options.score, model, encoder, rows)
        mean = statistics.mean(values)
        results = {"kind": kind, "mean": mean, "values": values}
        return Scored(results, ["data", "rows", kind], [[options.data, str(len(rows)), f"{mean:.4f}"]])

    return scoring


def _values(how: str, model, encoder: Encoder, rows: Sequence[Example]) -> tuple[str, list[float]]:
    if how == "log_prob":
        right = scores.option_log_prob_correct(model, encoder, rows, progress=True)
        return "accuracy (log-prob)", list(map(float, right))
    if how == "generated":
        right = scores.option_generated_correct(model, encoder, rows, progress=True)
        return "accuracy (generated)", list(map(float, right))
    if how == "rouge":
        answers = scores.generate_answers(model, encoder, rows, progress=True)
        pairs = zip(answers, rows, strict=True)
        return "rouge_l_recall", [scores.rouge_l_recall(text, row.answer) for text, row in pairs]
    if how == "probability":
        losses = memorisation.answer_losses(model, encoder, rows, progress=True)
        return "probability", [row.probability for row in losses]
    if how == "truth_ratio":
        return "truth ratio (geometric)", memorisation.truth_ratios(model, encoder, rows, progress=True)
    if how in ("extraction_strength", "exact_memorisation"):
        predicted = memorisation.predicted_tokens(model, encoder, rows, progress=True)
        return how, list(map(getattr(memorisation, how), predicted))
    result = scores.score(model, encoder, rows, progress=True)
    return result.kind, result.values


def _tofu(options: EvaluateOptions, load: Callable[[str], tuple]) -> Scoring:
    forget = load_sets(options.tofu, options.forget_split)["forget"]
    retain = None
    if options.retain_log is not None:
        retain = read_truth_ratios(options.retain_log)
    elif options.retain_model is not None:
        retain = memorisation.truth_ratios(*load(options.retain_model), forget, progress=True)

    def scoring(model, encoder: Encoder) -> Scored:
        report = tofu_report(
            model, encoder, options.tofu, options.forget_split, retain_truth_ratios=retain, progress=True
        )
        lines = [[name, score, "–" if value is None else f"{value:.4g}"] for name, score, value in report.rows()]
        return Scored(report.as_dict(), ["set", "score", "value"], lines)

    return scoring


def _harness(options: EvaluateOptions) -> Scoring:
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    harness.require()

    def scoring(model, encoder: Encoder) -> Scored:
        found = harness.harness_scores(model, encoder.tokenizer, tasks, options.items)
        mean = statistics.mean(score.accuracy for score in found.values())
        lines = [
            [task, str(score.items), name.partition(",")[0], f"{value:.4f}"]
            for task, score in found.items()
            for name, value in score.metrics.items()
        ]
        results = {"tasks": {task: asdict(score) for task, score in found.items()}, "mean_accuracy": mean}
        return Scored(results, ["task", "items", "metric", "value"], [*lines, ["mean", "", "accuracy", f"{mean:.4f}"]])

    return scoring
