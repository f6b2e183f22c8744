"""`ssiuu-fast demo`: runs the experiment over methods and seeds, prints the table, draws the figure."""

import statistics
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import models
from ssiuu_fast.experiment import (
    ATTACKS,
    BEFORE,
    CHANCE,
    COLUMNS,
    TAUGHT,
    Recipe,
    Say,
    Task,
    attack_task,
    carry_teaching,
    load_model,
    memorised_in,
    retrain_on_a_few,
    scores_of,
    unlearn_logged,
)
from ssiuu_fast.influence_study import Study, notes_on_options, study, with_options
from ssiuu_fast.report.figures import grouped_bars
from ssiuu_fast.report.influence_page import study_text, write_page
from ssiuu_fast.report.method_table import PENALTY_SHARE_NOTE
from ssiuu_fast.report.text import comparison, mean_sd, table
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.workers import run_jobs

METHODS = ("GD", "Ssiuu")
# as much as a few seconds allow
SILENCED, INFLUENCE_BATCH = (10, 30, 100), 32


def run_demo(task: Task, recipe: Recipe, seeds: int, run: RunFolder) -> list[dict]:
    """Memorises, unlearns and attacks; returns the rows.

    Writes results.json, table.md and recovery.png, and for the first seed of each method influence.md and page.html.

    What a stopped run already finished (the memorised model, a method's seed) is taken from the folder, not run again.
    """
    disable_progress_bar()
    taught = memorised_in(run, task, recipe)
    print(
        f"a model of {taught['parameters'] / 1e6:.1f} M parameters, after {taught['epochs']} epochs at learning rate "
        f"{taught['learning_rate']:g}: scores {taught['score']:.3f} on what it is to forget, "
        f"{taught['score_of_all']:.3f} on all {taught['rows']} rows"
    )
    # the longest first; before unlearning there is one model, so one seed
    jobs = [(method, seed) for seed in range(seeds) for method in reversed(METHODS)] + [(BEFORE, 0)]
    done = {job: _finished(job, run) for job in jobs if _finished(job, run) is not None}
    done = run_jobs(_job, lambda _: jobs, (task, recipe, run.path), description="runs", done=done)
    rows = [done[method, seed] for method in (BEFORE, *METHODS) for seed in range(seeds) if (method, seed) in done]
    rows.append({"method": CHANCE, "seed": None} | dict.fromkeys(COLUMNS, task.chance) | {"penalty_share": 0.0})
    run.write_json("results.json", rows)
    text = report(
        rows, {job: run.read_json(f"{job[0]}-{job[1]}.json")["unlearning"] for job in jobs if job[0] != BEFORE}
    )
    run.file("table.md").write_text(text + "\n", encoding="utf-8")
    scores = {
        method: {name: [row[name] for row in rows if row["method"] == method] for name in COLUMNS}
        for method in (BEFORE, *METHODS)
    }
    grouped_bars(run.file("recovery.png"), COLUMNS, scores, chance=task.chance, title="what retraining brings back")
    print(f"\n{text}\n")
    influence_text, page = _influence(task, recipe, run)
    print(f"{influence_text}\n")
    print(f"written to {run.path}/: results.json, table.md, recovery.png; a JSON file and a model a run")
    print(f"erased or hidden, in pictures: {page}")
    return rows


def run_method(method: str, seed: int, task: Task, recipe: Recipe, taught: Path, run: RunFolder, say: Say) -> dict:
    """One row of the table: unlearns a fresh copy of the taught model by `method` and attacks what is left.

    "before" attacks the taught model itself. Where the threshold wasn't reached, the pool rule is left out: it would
    leave little to score. Everything that was measured goes to <method>-<seed>.json in the run's folder, every step to
    <method>-<seed>.steps.jsonl, the model to a folder of that name.
    """
    name = f"{method}-{seed}"
    model, encoder = load_model(taught, recipe)
    details: dict = {}
    if method != BEFORE:
        details = unlearn_logged(model, encoder, method.lower(), seed, task, recipe, run, name, say)
        for note in details["notes"]:
            say(f"  {name}: {note}")
        models.save(model, encoder.tokenizer, run.file(name))
        carry_teaching(taught, run.file(name))
    row = {"method": method, "seed": seed} | scores_of(model, encoder, task, recipe)
    attacks = attack_task(model, encoder, seed, task, recipe, only_wrong=details.get("reached", False))
    row |= {attack.name: attack.recovered for attack in attacks}
    row["penalty_share"] = details.get("penalty_share", 0.0)
    recovered = ", ".join(f"{attack.name} {attack.recovered:.2f}" for attack in attacks)
    say(f"{method}, seed {seed}: after retraining {recovered}")
    run.write_json(
        f"{name}.json", {"row": row, "unlearning": details, "attacks": [attack.as_dict() for attack in attacks]}
    )
    return row


def _influence(task: Task, recipe: Recipe, run: RunFolder) -> tuple[str, Path]:
    """The influence table and its page for the first seed of each method, attacked by retraining on a few rows."""
    studies = run_jobs(_study, lambda _: METHODS, (task, recipe, run.path), description="influence")
    page = write_page([studies[method] for method in METHODS], run.path, "Erased or hidden? GD and Ssiuu")
    text = study_text([studies[method] for method in METHODS])
    run.file("influence.md").write_text(text + "\n", encoding="utf-8")
    return text, page


def report(rows: list[dict], unlearning: dict[tuple[str, int], dict]) -> str:
    """The table (mean ± sd over seeds) and, in words, whether Ssiuu recovers less than GD.

    unlearning: what each (method, seed) did: epochs, whether it reached the threshold.
    """

    def values(method: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["method"] == method]

    header = ["", *(column.replace("_", " ") for column in COLUMNS), "penalty share"]
    lines = [
        [method, *(mean_sd(values(method, column)) for column in COLUMNS), mean_sd(values(method, "penalty_share"))]
        for method in (BEFORE, *METHODS, CHANCE)
    ]
    return "\n".join(
        [
            table(header, lines),
            "",
            f"mean ± sd over {len(values('GD', 'FS'))} seeds; {BEFORE}: one attack on the model as it was taught.",
            "FS: score on the forget set (lower is better). RS: on rows held out from unlearning (higher is better).",
            "harmful p: highest score on the rest of the forget set while retraining on a fraction p of it;",
            "benign: on the forget set while retraining on unrelated instructions (lower is better).",
            PENALTY_SHARE_NOTE,
            "",
            *(_reached(method, unlearning) for method in METHODS),
            *_verdicts(values, all(details["reached"] for details in unlearning.values())),
        ]
    )


def _reached(method: str, unlearning: dict[tuple[str, int], dict]) -> str:
    runs = [details for (name, _), details in unlearning.items() if name == method]
    epochs = ", ".join(f"{details['epochs']:g}" for details in runs)
    reached = sum(details["reached"] for details in runs)
    return f"- {method} reached the threshold in {reached} of {len(runs)} runs (epochs: {epochs})"


def _verdicts(values, comparable: bool) -> list[str]:
    if not comparable:
        return ["- a run that did not reach the threshold is attacked on rows it still knows: no verdict on recovery"]
    verdicts = [
        f"- {column.replace('_', ' ')}: {comparison('Ssiuu', values('Ssiuu', column), 'GD', values('GD', column))}"
        for column in ATTACKS
    ]
    kept = statistics.mean(values("Ssiuu", "RS")) - statistics.mean(values("GD", "RS"))
    return [*verdicts, f"- retention (RS): Ssiuu {kept:+.2f} against GD"]


def _finished(job: tuple[str, int], run: RunFolder) -> dict | None:
    name = f"{job[0]}-{job[1]}.json"
    return run.read_json(name)["row"] if run.file(name).exists() else None


def _study(method: str, task: Task, recipe: Recipe, folder: Path, say: Say) -> Study:
    name = f"{method}-0"

    attacked = folder / f"{name}-attacked"
    model, encoder = load_model(folder / name, recipe)
    retrain_on_a_few(model, encoder, task, recipe)
    models.save(model, encoder.tokenizer, attacked)
    return study(
        method,
        {"before": str(folder / TAUGHT), "after": str(folder / name), "attacked": str(attacked)},
        with_options(task.split.forget),
        lambda place: load_model(place, recipe),
        batch_size=INFLUENCE_BATCH,
        notes=notes_on_options(task.split.forget),
        ms=SILENCED,
        progress=False,
    )


def _job(job: tuple[str, int], task: Task, recipe: Recipe, folder: Path, say: Say) -> dict:
    return run_method(*job, task, recipe, folder / TAUGHT, RunFolder(folder), say)
