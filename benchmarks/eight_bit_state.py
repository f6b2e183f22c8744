"""What do references of 16 and 8 bits cost: in the penalty's gradient, in steps, and in what the attacks recover?

    python benchmarks/eight_bit_state.py [--seeds 3] [--json rows.json] [--work folder]

The demo's invented people and model (experiment.py), Ssiuu at relative_weight 30, once with ordinary batches of 16
forget rows and once with the whole forget set as one batch. Beside the fp32 run two more sets of references, of 16 and
of 8 bits, are fed the same gradients on the same trajectory: the error is ‖v − v_fp32‖ / ‖v_fp32‖ of the penalty's
gradient v = ∂R/∂φ over all regularised parameters, a step. Each state then unlearns by itself and is attacked.
Prints a Markdown table: mean ± standard deviation over the seeds; median (10 % … 90 %) over the steps of a run,
averaged over the seeds.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rows import hardware, now, quantiles, versions, write_rows

from ssiuu_fast import SSIUURegularizer, models
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.experiment import PEOPLE, attack_task, memorise, people_task
from ssiuu_fast.ops import penalty_
from ssiuu_fast.references import empty_references
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.unlearning import unlearn

STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}


@dataclass
class StateRow:
    """One unlearning run: how its references are stored, and what came of it.

    change: median |A − A_ref| / |A|, errors: of the other states' gradients beside an fp32 run; 10 %, 50 % and 90 %
    quantiles over the steps.
    """

    batches: str
    state: str
    seed: int
    stopped_by: str
    steps: int
    forget_score: float
    retain_score: float
    penalty_share: float
    warned: bool
    change: tuple[float, float, float] | None
    errors: dict[str, tuple[float, float, float]]
    attacks: dict[str, float]
    seconds: float
    hardware: str = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)
    timestamp: str = field(default_factory=now)


class Shadowed(SSIUURegularizer):
    """A regulariser that shows every step's gradients to references of other dtypes too."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.errors = {name: [] for name in STATES if name != "float32"}
        parameters = dict(zip(self.parameter_names, self.regularized_parameters, strict=True))
        self._shadows = {name: empty_references(parameters, state) for name, state in STATES.items()}
        self._first = True
        self._add_penalty = self._grain.add_penalty
        self._grain.add_penalty = self._watched

    def _watched(self, gradients, *rest):
        vectors = {}
        for name, references in self._shadows.items():
            vectors[name] = [gradient.clone() for gradient in gradients.values()]
            penalty_(
                vectors[name],
                self.regularized_parameters,
                list(references.values()),
                weight=1.0,
                first=self._first,
            )
        truth = torch.nn.utils.get_total_norm(vectors["float32"])
        if not self._first and truth > 0:
            for name, errors in self.errors.items():
                gaps = [a - b for a, b in zip(vectors[name], vectors["float32"], strict=True)]
                errors.append((torch.nn.utils.get_total_norm(gaps) / truth).item())
        self._first = False
        return self._add_penalty(gradients, *rest)


class ShadowedTrainer(UnlearningTrainer):
    def new_regularizer(self, model, **options):
        return Shadowed(model, **options)


def now_and_then(measure, every):
    """measure(model), asked for in each `every`-th call and repeated in between."""
    calls, last = itertools.count(), None

    def latest(model):
        nonlocal last
        if next(calls) % every == 0:
            last = measure(model)
        return last

    return latest


def run(task, recipe, taught, batches, state, seed, scored_every=1):
    start = time.perf_counter()
    model, tokenizer = models.load(taught)
    encoder = Encoder(tokenizer, max_length=recipe.max_positions)
    changes, runs = [], []
    kind = ShadowedTrainer if state == "float32" else UnlearningTrainer

    def trainer(*arguments, **options):
        runs.append(kind(*arguments, **options))
        return runs[-1]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        progress = unlearn(
            model,
            encoder,
            task.split.forget,
            task.split.retain,
            objective="gd",
            learning_rate=recipe.unlearning_rate,
            threshold=task.threshold,
            forget_score=now_and_then(lambda model: score(model, encoder, task.split.forget).mean, scored_every),
            penalty={"relative_weight": recipe.relative_weight, "state_dtype": state},
            max_epochs=recipe.max_epochs,
            batch_size=recipe.batch_size,
            seed=seed,
            log=lambda row: changes.append(row["relative_change"]) if "relative_change" in row else None,
            trainer=trainer,
        )
    errors = runs[0].regularizer.errors if state == "float32" else {}
    retained = score(model, encoder, task.split.test).mean
    attacks = attack_task(model, encoder, seed, task, recipe, only_wrong=progress.reached)
    return StateRow(
        batches=batches,
        state=state,
        seed=seed,
        stopped_by=progress.stopped_by,
        steps=progress.steps,
        forget_score=progress.score,
        retain_score=retained,
        penalty_share=progress.penalty_share,
        warned=any("compares rounding errors" in str(warning.message) for warning in said),
        change=quantiles(changes) if changes else None,
        errors={name: quantiles(values) for name, values in errors.items()},
        attacks={attack.name: attack.recovered for attack in attacks},
        seconds=time.perf_counter() - start,
    )


def mean_sd(values, form=".2f"):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}}"


def middle(runs, form):
    """Median and the 10 % and 90 % quantiles, averaged over runs."""
    if not runs:
        return "–"
    low, median, high = (statistics.mean(values) for values in zip(*runs, strict=True))
    return f"{median:{form}} ({low:{form}} … {high:{form}})"


def table(rows):
    names = list(rows[0].attacks)
    heads = ["batches", "state", "error of ∂R/∂φ", "change of A", "warned", "steps", "share", "FS", "RS", *names]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for batches in dict.fromkeys(row.batches for row in rows):
        of_batches = [row for row in rows if row.batches == batches]
        shadows = [row.errors for row in of_batches if row.errors]
        for state in STATES:
            some = [row for row in of_batches if row.state == state]
            if not some:
                continue
            cells = [
                batches,
                state,
                middle([errors[state] for errors in shadows if state in errors], ".1%"),
                middle([row.change for row in some if row.change], ".0%"),
                f"{sum(row.warned for row in some)} of {len(some)}",
                mean_sd([row.steps for row in some], ".0f"),
                f"{statistics.mean(row.penalty_share for row in some):.0%}",
                mean_sd([row.forget_score for row in some]),
                mean_sd([row.retain_score for row in some]),
                *(mean_sd([row.attacks[name] for row in some]) for name in names),
            ]
            print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file, after every run; those there are kept")
    parser.add_argument("--work", type=Path, help="folder for the taught model; one that is there is used again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware()}, 1 thread; {', '.join(f'{name} {version}' for name, version in versions().items())}")
    task = people_task()
    whole = len(task.split.forget)
    steps = -(-whole // PEOPLE.batch_size)
    kinds = {
        f"{PEOPLE.batch_size} of {whole}": (PEOPLE, 1),
        # as many steps at most; an epoch is one step, and scoring takes half as long as that
        f"all {whole}": (replace(PEOPLE, batch_size=whole, max_epochs=PEOPLE.max_epochs * steps), 5),
    }
    rows = []
    if args.json and args.json.exists():
        rows = [StateRow(**row) for row in json.loads(args.json.read_text())]
    done = {(row.batches, row.state, row.seed) for row in rows}
    to_do = [key for key in itertools.product(kinds, STATES, range(args.seeds)) if key not in done]
    taught = (args.work or Path(tempfile.mkdtemp())) / "taught"
    if to_do and not taught.exists():
        print(memorise(task, PEOPLE, taught, progress=False))
    for batches, state, seed in to_do:
        recipe, scored_every = kinds[batches]
        rows.append(run(task, recipe, taught, batches, state, seed, scored_every))
        summary = asdict(rows[-1])
        brief = ("batches", "state", "seed", "stopped_by", "steps", "penalty_share", "warned", "attacks")
        print({name: summary[name] for name in brief}, flush=True)
        if args.json:
            write_rows(args.json, rows)
    table(rows)


if __name__ == "__main__":
    main()
