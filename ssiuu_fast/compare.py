"""`ssiuu-fast compare`: each method at the lowest learning rate that reaches the threshold, over seeds, then attacked.

`Sweep` says which runs come next, a function of the results so far; here they are done, and kept in files, so that a
stopped sweep goes on with the next one.
"""

import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ssiuu_fast import models
from ssiuu_fast.experiment import (
    ATTACKS,
    BEFORE,
    Say,
    Task,
    UnlearningRecipe,
    attack_task,
    carry_teaching,
    load_model,
    scores_of,
    unlearn_logged,
)
from ssiuu_fast.outcomes import sweep_lines
from ssiuu_fast.report.figures import grouped_bars
from ssiuu_fast.report.method_table import method_table, notes_on_sweep
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.sweep import BEFORE_JOB, Job, Sweep
from ssiuu_fast.workers import run_jobs


def run_sweep(
    sweep: Sweep, task: Task, recipe: UnlearningRecipe, start: str | Path, run: RunFolder, *, notes: Sequence[str] = ()
) -> list[dict]:
    """Searches, unlearns and attacks; returns the lines of the table (`outcomes.sweep_lines`).

    start: the model that every run begins from. notes: more to say under the table. Writes results.json, table.md and
    comparison.png; every run has files of its own in runs/, and what a stopped sweep finished is taken from there. A
    run that raised, or whose process was killed, makes a line that says so, and is tried again when the sweep goes on.
    Raises ValueError where the model knows nothing of the forget set.
    """
    parts = RunFolder(run.file("runs"))
    parts.path.mkdir(exist_ok=True)

    def ready(done: dict) -> list[Job]:
        _require_known(done, task)
        return sweep.ready(done)

    # of several GPUs each process sees its own, as the first
    in_process = replace(recipe, device=recipe.device and recipe.device.partition(":")[0])
    done = run_jobs(
        work,
        ready,
        (sweep, task, in_process, str(start), parts.path),
        description="runs",
        done=finished(sweep, parts),
        device=recipe.device,
        died=partial(killed, parts=parts),
    )
    lines = sweep_lines(sweep, done, task)
    run.write_json("results.json", lines)
    columns = columns_of(task)
    text = "\n".join(
        [method_table(lines, columns, task.chance), "", *notes_on_sweep(sweep, task, recipe, lines), *notes]
    )
    run.file("table.md").write_text(text + "\n", encoding="utf-8")
    drawn = {line["label"]: line["scores"] for line in lines if all(line["scores"].get(name) for name in columns)}
    if drawn:
        grouped_bars(
            run.file("comparison.png"), columns, drawn, chance=task.chance, title="what retraining brings back"
        )
    print(f"\n{text}\n\nwritten to {run.path}/: results.json, table.md, comparison.png; a JSON file a run in runs/")
    return lines


def columns_of(task: Task) -> tuple[str, ...]:
    """The scores of the table, in the paper's order."""
    utility = () if task.utility is None else ("US",)
    return ("FS", "RS", *utility, *ATTACKS)


def finished(sweep: Sweep, parts: RunFolder) -> dict[Job, dict]:
    """What an earlier process of this sweep left in its folder."""
    done: dict[Job, dict] = {}
    while left := [job for job in sweep.ready(done) if job not in done and parts.file(f"{job.file}.json").exists()]:
        done |= {job: parts.read_json(f"{job.file}.json") for job in left}
    return done


def work(job: Job, sweep: Sweep, task: Task, recipe: UnlearningRecipe, start: str, folder: Path, say: Say) -> dict:
    """Does one job and writes its result to <job.file>.json; of one that raises, only the traceback (.error.txt)."""
    parts = RunFolder(folder)
    parts.file(f"{job.file}.error.txt").unlink(missing_ok=True)
    clock, processor = time.perf_counter(), time.process_time()
    try:
        if job.what == "unlearn":
            result = _unlearn(job, sweep, task, recipe, start, parts, say)
        else:
            result = _attack(job, task, recipe, start, parts, say)
    # whatever it is, the other methods go on
    except Exception as error:
        return _failed(job, f"{type(error).__name__}: {error}", traceback.format_exc(), parts, say)
    result |= {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    parts.write_json(f"{job.file}.json", result)
    if job.what == "attack" and job.seed > 0:
        # of each line one model is enough to look at
        shutil.rmtree(parts.file(job.unlearning.file))
    return result


def killed(job: Job, how: str, say: Say, *, parts: RunFolder) -> dict:
    """The result of a job whose process was killed, and couldn't write anything itself."""
    return _failed(job, how, how, parts, say)


def _failed(job: Job, message: str, written: str, parts: RunFolder, say: Say) -> dict:
    parts.file(f"{job.file}.error.txt").write_text(f"{written.rstrip()}\n", encoding="utf-8")
    say(f"{job.file}: {message}")
    return {"error": message}


def _unlearn(
    job: Job, sweep: Sweep, task: Task, recipe: UnlearningRecipe, start: str, parts: RunFolder, say: Say
) -> dict:
    model, encoder = load_model(start, recipe)
    details: dict = {}
    if job.label != BEFORE:
        line = sweep.line(job.label)
        terms = replace(recipe, unlearning_rate=job.learning_rate, max_epochs=line.max_epochs)
        details = unlearn_logged(model, encoder, line.method, job.seed, task, terms, parts, job.file, say)
        if not details["reached"]:
            return {"unlearning": details}
        models.save(model, encoder.tokenizer, parts.file(job.file))
        carry_teaching(start, parts.file(job.file))
    return {"unlearning": details} | scores_of(model, encoder, task, recipe)


def _attack(job: Job, task: Task, recipe: UnlearningRecipe, start: str, parts: RunFolder, say: Say) -> dict:
    is_before = job.label == BEFORE
    model, encoder = load_model(start if is_before else parts.file(job.unlearning.file), recipe)
    attacks = attack_task(model, encoder, job.seed, task, recipe, only_wrong=not is_before)
    say(f"{job.file}: " + ", ".join(f"{attack.name} {attack.recovered:.2f}" for attack in attacks))
    return {"attacks": [attack.as_dict() for attack in attacks]}


def _require_known(done: Mapping[Job, dict], task: Task) -> None:
    before = done.get(BEFORE_JOB)
    if before is None:
        return
    if "error" in before:
        raise ValueError(f"the model can't be scored before unlearning: {before['error']}")
    if before["FS"] <= task.threshold:
        raise ValueError(
            f"the model scores {before['FS']:.3f} on what it is to forget, already at or under the threshold "
            f"{task.threshold:.3f}: it doesn't know these rows, and there is nothing to compare"
        )
