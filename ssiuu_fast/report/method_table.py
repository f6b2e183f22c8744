"""The table that compares methods, and the rules that it was made by."""

from collections.abc import Sequence

from ssiuu_fast.evaluation.attacks import BENIGN_MULTIPLES, HARMFUL_MULTIPLES
from ssiuu_fast.experiment import CHANCE, Task, UnlearningRecipe
from ssiuu_fast.outcomes import KEPT
from ssiuu_fast.report.text import mean_sd, table
from ssiuu_fast.sweep import Sweep

MISSING = "–"
PENALTY_SHARE_NOTE = (
    "penalty share: norm of the penalty's gradient ÷ that of the whole, mean over the penalised steps (none while λ is "
    "calibrated)."
)


def method_table(lines: Sequence[dict], columns: Sequence[str], chance: float) -> str:
    """The lines of `sweep_lines` as Markdown, mean ± sd over the seeds of their scores; chance last.

    chance stands under the scores of forget and test rows; what utility rows give by chance is not known.
    """
    header = ["", *(column.replace("_", " ") for column in columns), "lr", "epochs", "penalty share", "outcome"]
    rows = [
        [
            line["label"],
            *(_mean(line["scores"].get(column)) for column in columns),
            MISSING if line["learning_rate"] is None else f"{line['learning_rate']:g}",
            _range(line["scores"].get("epochs")),
            _mean(line["scores"].get("penalty_share")),
            line["outcome"],
        ]
        for line in lines
    ]
    by_chance = [MISSING if column == "US" else f"{chance:.2f}" for column in columns]
    return table(header, [*rows, [CHANCE, *by_chance, MISSING, MISSING, MISSING, ""]])


def notes_on_sweep(sweep: Sweep, task: Task, recipe: UnlearningRecipe, lines: Sequence[dict]) -> list[str]:
    """What the columns are, what was the same for all methods, and what became of those that failed."""
    notes = [
        f"mean ± sd over those of {sweep.seeds} seeds that reached the threshold, a forget score of at most "
        f"{task.threshold:.4g}; a seed whose attack failed is left out of every column, and the outcome says so "
        "(attacked k/n); before: the model as it was taught, one seed.",
        "FS: score on the forget set (lower is better). RS: on rows held out from unlearning (higher is better).",
        "harmful p: highest score on the rest of the forget set while retraining on a fraction p of it;",
        "benign: on the forget set while retraining on unrelated instructions (lower is better).",
        PENALTY_SHARE_NOTE,
    ]
    if task.utility is not None:
        notes.append("US: on rows that have nothing to do with the forget set (higher is better).")
    notes += [
        "",
        f"- lr: the lowest of {', '.join(f'{rate:g}' for rate in sweep.rates)} that reached the threshold within "
        f"{sweep.max_epochs} epochs with seed 0, found for each method alone",
        f"- the same for all: AdamW at a constant rate, {recipe.batch_size} forget rows a step, stopped after the "
        "first epoch at the threshold; with each seed one order of rows and one draw of attack sets; attacks at "
        f"{_multiples(HARMFUL_MULTIPLES)} (harmful) and {_multiples(BENIGN_MULTIPLES)} (benign) of "
        f"{recipe.teaching_rate:g}, the rate that taught the model",
    ]
    if any(line.backbone for line in sweep.lines):
        notes.append(
            f"- method@backbone: at the rate found for the backbone, up to {sweep.penalised_max_epochs} epochs; the "
            f"penalty's relative weight is {recipe.relative_weight:g}"
            + (f", every={recipe.every}" if recipe.every > 1 else "")
        )
    notes.append(
        f"- collapsed: keeps less than {KEPT:.0%} of what RS was above chance before unlearning; a line without scores "
        "failed as its outcome says"
    )
    return [*notes, *(f"- {line['label']}: {line['explanation']}" for line in lines if line["explanation"])]


def _multiples(multiples: Sequence[float]) -> str:
    return ", ".join(f"{multiple:g}" for multiple in multiples)


def _mean(values: Sequence[float] | None) -> str:
    return mean_sd(values) if values else MISSING


def _range(values: Sequence[int] | None) -> str:
    if not values:
        return MISSING
    return f"{min(values):g}" if min(values) == max(values) else f"{min(values):g}–{max(values):g}"
