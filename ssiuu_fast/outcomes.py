"""What a comparison of methods found: a line of the table for each; of those that failed, in words that say how."""

from collections.abc import Mapping

from ssiuu_fast.experiment import ATTACKS, BEFORE, Task
from ssiuu_fast.sweep import BEFORE_JOB, Job, Line, Sweep

# a run has collapsed if it keeps less than this of what retention was above chance
KEPT = 0.25


def sweep_lines(sweep: Sweep, done: Mapping[Job, dict], task: Task) -> list[dict]:
    """The lines, `before` first, as JSON-ready dicts.

    label; method; learning_rate (None where none was found); outcome, a few words; explanation, a sentence or None;
    searched: what each rate gave, seed 0; seeds: what each run at the found rate gave; scores: column → one value for
    each seed that reached the threshold and was attacked, the same seeds in every column.
    """
    attacks = done[BEFORE_JOB.attack]
    before = {name: done[BEFORE_JOB][name] for name in ("FS", "RS", "US") if name in done[BEFORE_JOB]}
    lines = [
        _line(BEFORE, None, None)
        | {"scores": {name: [value] for name, value in (before | _recovered(attacks)).items()}}
        | ({"outcome": "error", "explanation": f"attack: {attacks['error']}"} if "error" in attacks else {})
    ]
    lines += [_outcome(line, sweep, done) for line in sweep.lines]
    for line in lines[1:]:
        _mark_collapse(line, before["RS"], task.chance)
    return lines


def _line(label: str, method: str | None, learning_rate: float | None) -> dict:
    empty = {"outcome": "", "explanation": None, "searched": [], "seeds": [], "scores": {}}
    return {"label": label, "method": method, "learning_rate": learning_rate} | empty


def _outcome(line: Line, sweep: Sweep, done: Mapping[Job, dict]) -> dict:
    rate = sweep.rate(line, done)
    found = _line(line.label, line.method, rate)
    if line.backbone is None:
        searched = [job for job in sweep.search(line, done) if job in done]
        found["searched"] = [{"learning_rate": job.learning_rate} | _figures(done[job]) for job in searched]
    if rate is None:
        return found | _not_found(line, found["searched"])
    runs = sweep.runs(line, done)
    found["seeds"] = [_seed(job, done) for job in runs]
    arrived = [seed for seed in found["seeds"] if seed.get("reached")]
    # columns of different seeds couldn't be read beside each other
    attacked = [seed for seed in arrived if "error" not in seed]
    found["scores"] = {
        column: values
        for column in ("FS", "RS", "US", *ATTACKS, "epochs", "penalty_share")
        if (values := [seed[column] for seed in attacked if seed.get(column) is not None])
    }
    return found | _how_many(line, found["seeds"], len(arrived), len(attacked))


def _seed(job: Job, done: Mapping[Job, dict]) -> dict:
    seed = {"seed": job.seed} | _figures(done[job])
    attacks = done.get(job.attack)
    if attacks is not None and "error" in attacks:
        seed["error"] = f"attack: {attacks['error']}"
    return seed | _recovered(attacks)


def _figures(result: dict) -> dict:
    """The figures of one unlearning run."""
    if "error" in result:
        return {"reached": False, "error": result["error"]}
    details = result["unlearning"]
    names = ("reached", "epochs", "score", "stopped_by", "penalty_share", "weight", "notes")
    return {name: details[name] for name in names} | {name: result[name] for name in result if name != "unlearning"}


def _recovered(attacks: dict | None) -> dict[str, float]:
    return {attack["name"]: attack["recovered"] for attack in (attacks or {}).get("attacks", [])}


def _not_found(line: Line, searched: list[dict]) -> dict:
    """Why there is no learning rate."""
    if line.backbone is not None:
        said = f"it takes the learning rate found for {line.backbone}, and none was found"
        return {"outcome": "no rate", "explanation": said}
    last = searched[-1]
    if "error" in last:
        return {"outcome": "error", "explanation": f"at learning rate {last['learning_rate']:g}: {last['error']}"}
    diverged = [run for run in searched if run["stopped_by"] == "divergence"]
    rates = f"{len(searched)} learning rates from {searched[0]['learning_rate']:g} to {last['learning_rate']:g}"
    if len(diverged) == len(searched):
        return {"outcome": "diverged", "explanation": f"diverged at each of {rates}"}
    best = min(searched, key=lambda run: run["score"])
    said = (
        f"never reached the threshold within {line.max_epochs} epochs at any of {rates}; lowest forget score "
        f"{best['score']:.3f}, at {best['learning_rate']:g}"
    )
    if diverged:
        said += "; diverged at " + ", ".join(f"{run['learning_rate']:g}" for run in diverged)
    return {"outcome": "never reached", "explanation": said}


def _how_many(line: Line, seeds: list[dict], arrived: int, attacked: int) -> dict:
    failed = "error, " if any("error" in seed for seed in seeds) else ""
    said = []
    for seed in seeds:
        if "error" in seed:
            said.append(f"seed {seed['seed']}: {seed['error']}")
        elif not seed["reached"]:
            how = "diverged" if seed["stopped_by"] == "divergence" else f"not reached in {line.max_epochs} epochs"
            said.append(f"seed {seed['seed']}: {how}, lowest forget score {seed['score']:.3f}")
    left_out = f", attacked {attacked}/{arrived}" if attacked < arrived else ""
    outcome = f"{failed}reached {arrived}/{len(seeds)}{left_out}"
    return {"outcome": outcome, "explanation": "; ".join(said) or None}


def _mark_collapse(line: dict, before: float, chance: float) -> None:
    """Says so where retention is as good as gone."""
    kept = line["scores"].get("RS")
    if not kept:
        return
    mean = sum(kept) / len(kept)
    if mean - chance < KEPT * (before - chance):
        line["outcome"] += ", collapsed"
        said = f"collapsed: RS fell from {before:.2f} to {mean:.2f}, chance is {chance:.2f}"
        line["explanation"] = "; ".join(filter(None, [line["explanation"], said]))
