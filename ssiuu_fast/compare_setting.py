"""From the options of `compare` to what it runs; whatever is wrong with them is said here, before any run."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ssiuu_fast import models
from ssiuu_fast.comparison_options import CompareOptions
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example, Split, refuse_overlap
from ssiuu_fast.data.sources import load_examples, load_instructions
from ssiuu_fast.evaluation.scores import default_threshold
from ssiuu_fast.experiment import (
    PEOPLE,
    TOFU,
    Task,
    UnlearningRecipe,
    noted_teaching_rate,
    people_task,
    tofu_task,
)
from ssiuu_fast.methods import method as method_named
from ssiuu_fast.objectives import OBJECTIVES, make_objective
from ssiuu_fast.sampling import refuse_empty_micro_batches
from ssiuu_fast.sweep import Sweep, learning_rates

# the learning rate at which the paper's models were taught TOFU; attacks take multiples of it
PUBLISHED_TEACHING_RATE = 1e-5


@dataclass(frozen=True)
class Setting:
    """What a comparison runs. start: the model, None where a small one is taught first. notes: for under the table."""

    sweep: Sweep
    task: Task
    recipe: UnlearningRecipe
    start: str | None
    notes: list[str]

    @cached_property
    def digest(self) -> str:
        """sha256 of all that a run's result follows from: rows, recipe, rates, and which files the model is in."""
        weights = sorted(Path(self.start).glob("*.safetensors")) if self.start is not None else []
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
        return hashlib.sha256(repr((self.task, self.recipe, self.sweep, files)).encode()).hexdigest()


def setting(options: CompareOptions) -> Setting:
    """What these options ask for. Raises ValueError for methods, options or rows that can't be run."""
    objective_options = options.objective_options or {}
    _check_methods(options.methods, objective_options)
    notes = []
    if options.forget is None:
        task, recipe = _embedded(options)
    else:
        task = _own(options)
        recipe = UnlearningRecipe(teaching_rate=PUBLISHED_TEACHING_RATE, max_positions=512)
        if options.test is None:
            notes.append("- RS is on the retain rows, which the runs trained on: give test for rows that they did not")
    if options.threshold is not None:
        task = replace(task, threshold=options.threshold)
    if options.utility:
        sources = [options.utility] if isinstance(options.utility, str) else options.utility
        task = replace(task, utility=[row for source in sources for row in load_examples(source)])
    taught_at = options.taught_at
    if taught_at is None and options.model is not None:
        taught_at = noted_teaching_rate(options.model)
    recipe = replace(
        recipe,
        teaching_rate=taught_at or recipe.teaching_rate,
        max_positions=options.max_length or recipe.max_positions,
        relative_weight=options.relative_weight,
        every=options.every,
        objective_options=objective_options,
        **{name: getattr(options, name) for name in ("batch_size", "micro_batch_size", "style", "dtype", "device")},
    )
    sets = {"forget": task.split.forget}
    if any(OBJECTIVES[method_named(name).objective].needs_retain for name in options.methods):
        sets["retain"] = task.split.retain
    refuse_empty_micro_batches(recipe.batch_size, recipe.micro_batch_size, sets)
    if options.model is not None:
        _check_rows(options.model, recipe, task)
    rates = tuple(options.learning_rates or learning_rates(recipe.teaching_rate))
    sweep = Sweep(tuple(options.methods), options.seeds, rates, options.max_epochs, options.penalised_max_epochs)
    return Setting(sweep, task, recipe, options.model, notes)


def _embedded(options: CompareOptions):
    if options.data == "tofu":
        return tofu_task(options.tofu, options.instructions or "tatsu-lab/alpaca"), TOFU
    return people_task(options.instructions or "exercises"), PEOPLE


def _own(options: CompareOptions) -> Task:
    forget, retain = load_examples(options.forget), load_examples(options.retain)
    refuse_overlap(forget, retain, options.forget, options.retain)
    test = retain
    if options.test is not None:
        test = load_examples(options.test)
        refuse_overlap(forget, test, options.forget, options.test)
    threshold = default_threshold(forget)
    instructions = load_instructions(options.instructions or "exercises")
    return Task(Split(forget, retain, test), instructions, threshold, chance=threshold)


def _check_methods(names: list[str], objective_options: dict[str, dict]) -> None:
    objectives = {method_named(name).objective for name in names}
    for objective, chosen in objective_options.items():
        if objective not in objectives:
            raise ValueError(
                f"objective_options has {objective!r}, which none of the methods ({', '.join(names)}) is made of"
            )
        make_objective(objective, **chosen)


def _check_rows(model: str, recipe: UnlearningRecipe, task: Task) -> None:
    """Raises ValueError for a prompt that is too long, before anything runs."""
    encoder = Encoder(models.load_tokenizer(model), style=recipe.style, max_length=recipe.max_positions)
    rows: list[Example] = [*task.split.memorised, *task.instructions, *(task.utility or [])]
    for row in rows:
        encoder.encode(row)
