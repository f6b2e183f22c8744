"""`ssiuu-fast demo`: runs the experiment over methods and seeds, prints the table, draws the figure."""

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from queue import Empty

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import models
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.experiment import (
    ATTACKS,
    BEFORE,
    CHANCE,
    COLUMNS,
    METHODS,
    Recipe,
    Task,
    memorise,
    retrain_on_a_few,
    run_method,
)
from ssiuu_fast.influence_study import Study, notes_on_options, study, with_options
from ssiuu_fast.report.figures import grouped_bars
from ssiuu_fast.report.influence_page import study_text, write_page
from ssiuu_fast.report.text import comparison, mean_sd, table
from ssiuu_fast.runs import RunFolder

TAUGHT = "memorised"
# as much as a few seconds allow
SILENCED, INFLUENCE_BATCH = (10, 30, 100), 32


def run_demo(task: Task, recipe: Recipe, seeds: int, run: RunFolder) -> list[dict]:
    """Memorises, unlearns and attacks; returns the rows.

    Writes results.json, table.md and recovery.png, and for the first seed of each method influence.md and page.html.

    What a stopped run already finished (the memorised model, a method's seed) is taken from the folder, not run again.
    """
    disable_progress_bar()
    taught = _memorised(task, recipe, run)
    print(
        f"a model of {taught['parameters'] / 1e6:.1f} M parameters, after {taught['epochs']} epochs at learning rate "
        f"{taught['learning_rate']:g}: scores {taught['score']:.3f} on what it is to forget, "
        f"{taught['score_of_all']:.3f} on all {taught['rows']} rows"
    )
    # the longest first; before unlearning there is one model, so one seed
    jobs = [(method, seed) for seed in range(seeds) for method in reversed(METHODS)] + [(BEFORE, 0)]
    done = {job: _finished(job, run) for job in jobs if _finished(job, run) is not None}
    done |= _run_jobs([job for job in jobs if job not in done], task, recipe, run)
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


def _influence(task: Task, recipe: Recipe, run: RunFolder) -> tuple[str, Path]:
    """The influence table and its page for the first seed of each method, attacked by retraining on a few rows."""
    studies = _in_processes(_study, METHODS, "influence", task, recipe, run)
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
            "",
            *(_reached(method, unlearning) for method in METHODS),
            *_verdicts(values, all(details["reached"] for details in unlearning.values())),
        ]
    )


def _reached(method: str, unlearning: dict[tuple[str, int], dict]) -> str:
    runs = [details for (name, _), details in unlearning.items() if name == method]
    epochs = ", ".join(str(details["epochs"]) for details in runs)
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


def _memorised(task: Task, recipe: Recipe, run: RunFolder) -> dict:
    if not run.file("memorised.json").exists():
        run.write_json("memorised.json", memorise(task, recipe, run.file(TAUGHT)))
    return run.read_json("memorised.json")


def _run_jobs(jobs: list[tuple[str, int]], task: Task, recipe: Recipe, run: RunFolder) -> dict[tuple[str, int], dict]:
    return _in_processes(_job, jobs, "runs", task, recipe, run)


def _in_processes(work, jobs: Sequence, description: str, task: Task, recipe: Recipe, run: RunFolder) -> dict:
    """job → work(job, task, recipe, folder, messages), one process a core.

    One thread a process: small models gain nothing from more threads. On a GPU, one process.
    """
    if not jobs:
        return {}
    workers = 1 if torch.cuda.is_available() else min(len(jobs), _cores())
    context = multiprocessing.get_context("spawn")
    rows = {}
    with context.Manager() as manager:
        messages = manager.Queue()
        with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=len(jobs), desc=description) as bar:
            futures = {pool.submit(work, job, task, recipe, run.path, messages): job for job in jobs}
            try:
                while futures:
                    _print_messages(messages, bar)
                    for future in [future for future in futures if future.done()]:
                        rows[futures.pop(future)] = future.result()
                        bar.update()
                _print_messages(messages, bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return rows


def _quietly() -> None:
    # several processes share the terminal: the parent's bar is the only one
    disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def _study(method: str, task: Task, recipe: Recipe, folder: Path, messages) -> Study:
    _quietly()
    name = f"{method}-0"

    def load(place: str):
        model, tokenizer = models.load(place, device=models.default_device())
        return model, Encoder(tokenizer, max_length=recipe.max_positions)

    attacked = folder / f"{name}-attacked"
    model, encoder = load(str(folder / name))
    retrain_on_a_few(model, encoder, task, recipe)
    models.save(model, encoder.tokenizer, attacked)
    return study(
        method,
        {"before": str(folder / TAUGHT), "after": str(folder / name), "attacked": str(attacked)},
        with_options(task.split.forget),
        load,
        batch_size=INFLUENCE_BATCH,
        notes=notes_on_options(task.split.forget),
        ms=SILENCED,
        progress=False,
    )


def _job(job: tuple[str, int], task: Task, recipe: Recipe, folder: Path, messages) -> dict:
    _quietly()
    return run_method(*job, task, recipe, folder / TAUGHT, RunFolder(folder), messages.put)


def _print_messages(messages, bar) -> None:
    try:
        while True:
            bar.write(messages.get(timeout=0.2))
    except Empty:
        return


def _cores() -> int:
    # those that this process may use, where the system tells
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
