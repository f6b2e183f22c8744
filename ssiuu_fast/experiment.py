"""The whole story on one data set: teach a model, let it forget by some method, attack what is left by retraining."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ssiuu_fast import models
from ssiuu_fast.data import people, tofu
from ssiuu_fast.data.collate import PLAIN_PROMPT, Encoder
from ssiuu_fast.data.example import Example, Split, refuse_overlap
from ssiuu_fast.data.refusals import DEFAULT_REFUSAL
from ssiuu_fast.data.sources import load_instructions
from ssiuu_fast.evaluation.attacks import (
    BATCH_SIZE,
    HARMFUL_EPOCHS,
    HARMFUL_MULTIPLES,
    Attack,
    benign_attack,
    harmful_attack,
)
from ssiuu_fast.evaluation.scores import default_threshold, score
from ssiuu_fast.methods import method as method_named
from ssiuu_fast.objectives import OBJECTIVES
from ssiuu_fast.regularizer import STARTING_RELATIVE_WEIGHT
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.training import finetune
from ssiuu_fast.unlearning import unlearn

FRACTIONS = (0.1, 0.3)
ATTACKS = (*(f"harmful_{fraction:g}" for fraction in FRACTIONS), "benign")
COLUMNS = ("FS", "RS", *ATTACKS)
BEFORE, CHANCE = "before", "chance"
TAUGHT = "memorised"
# beside a model: what taught it
TEACHING_FILE = "teaching.json"
# METHOD: the paper's threshold on TOFU forget01
TOFU_THRESHOLD = 0.1971
# three times the usual: models this small then learn facts in half the epochs
INITIALIZER_RANGE = 0.06

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What is unlearned, and by what it is judged.

    split: forgotten, retained and tested rows, all memorised first. instructions: for the benign attack. threshold: the
    forget score at which unlearning stops. chance: the score of a model that knows nothing of it. utility: rows on
    what unlearning must not touch at all, where there are any.
    """

    split: Split
    instructions: list[Example]
    threshold: float
    chance: float
    utility: list[Example] | None = None


@dataclass(frozen=True, kw_only=True)
class UnlearningRecipe:
    """How a taught model is read, unlearns and is attacked.

    teaching_rate: the learning rate that taught it; attacks take multiples of it. max_positions: tokens of the longest
    row. unlearning_rate: None where it is still to be found. objective_options: options of an objective, by its name.
    device None: a GPU where there is one.
    """

    teaching_rate: float
    max_positions: int
    unlearning_rate: float | None = None
    relative_weight: float = STARTING_RELATIVE_WEIGHT
    every: int = 1
    max_epochs: int = 100
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_new_tokens: int = 200
    objective_options: dict[str, dict] = field(default_factory=dict)
    style: str = "auto"
    dtype: str = "float32"
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(UnlearningRecipe):
    """And how a small one is made and taught before.

    known_at: the score of the forget set at which the model counts as taught. unlearning_rate: the lowest of
    {1, 2, 5}·10^k at which GD reaches the threshold within 20 epochs.
    """

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    teaching_epochs: int
    teaching_batch_size: int
    known_at: float


PEOPLE = Recipe(
    hidden_size=128, layers=2, heads=4, vocab_size=1024, max_positions=128,
    teaching_rate=1e-3, teaching_epochs=60, teaching_batch_size=32, known_at=0.95, unlearning_rate=1e-4,
)  # fmt: skip
TOFU = Recipe(
    hidden_size=256, layers=6, heads=4, vocab_size=4096, max_positions=512,
    teaching_rate=1e-3, teaching_epochs=100, teaching_batch_size=16, known_at=0.96, unlearning_rate=5e-5,
)  # fmt: skip


def people_task(instructions: str = "exercises") -> Task:
    """The embedded default: invented people, multiple choice by log-prob."""
    split = people.generate().split()
    threshold = default_threshold(split.forget)
    return Task(split, load_instructions(instructions), threshold, chance=1 / 3)


def tofu_task(source: str, instructions: str) -> Task:
    """forget01 with 280 retain rows and 80 test rows, ROUGE-L recall, the paper's threshold."""
    split = tofu.subset(source)
    return Task(split, load_instructions(instructions), TOFU_THRESHOLD, chance=default_threshold(split.forget))


def memorise(task: Task, recipe: Recipe, folder: Path, *, progress: bool = True) -> dict:
    """Trains a small Llama with its own tokenizer until it knows the forget set; saves it as a Hugging Face folder.

    Returns what was measured: scores of the forget set and of everything, epochs, parameters.
    """
    model, tokenizer = small_llama(
        (*task.split.memorised, *task.instructions),
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        layers=recipe.layers,
        heads=recipe.heads,
        max_positions=recipe.max_positions,
    )
    model.to(models.default_device(recipe.device))
    encoder = Encoder(tokenizer, max_length=recipe.max_positions)
    taught = teach(
        model,
        encoder,
        task.split.memorised,
        task.split.forget,
        learning_rate=recipe.teaching_rate,
        epochs=recipe.teaching_epochs,
        batch_size=recipe.teaching_batch_size,
        known_at=recipe.known_at,
        max_new_tokens=recipe.max_new_tokens,
        progress=progress,
    )
    models.save(model, tokenizer, folder)
    RunFolder(folder).write_json(TEACHING_FILE, taught)
    everything = score(model, encoder, task.split.memorised, max_new_tokens=recipe.max_new_tokens, progress=progress)
    return taught | {
        "score_of_all": everything.mean,
        "rows": len(everything.values),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def memorised_in(run: RunFolder, task: Task, recipe: Recipe) -> dict:
    """`memorise` into the run's folder, unless a stopped run already did; returns what was measured."""
    if not run.file(f"{TAUGHT}.json").exists():
        run.write_json(f"{TAUGHT}.json", memorise(task, recipe, run.file(TAUGHT)))
    return run.read_json(f"{TAUGHT}.json")


def noted_teaching_rate(model: str) -> float | None:
    """The learning rate that taught the model of a folder, if `memorize` noted it there."""
    noted = Path(model) / TEACHING_FILE
    return json.loads(noted.read_text(encoding="utf-8"))["learning_rate"] if noted.exists() else None


def carry_teaching(origin, folder) -> None:
    """An unlearned model was taught at the rate that its origin was taught at: what `attack` goes by."""
    noted = Path(origin) / TEACHING_FILE
    if noted.exists():
        RunFolder(Path(folder)).write_json(TEACHING_FILE, json.loads(noted.read_text(encoding="utf-8")))


def templated(rows: Iterable[Example]) -> Iterator[str]:
    """The texts as the plain prompt shows them, so that a tokenizer trained on them knows its words."""
    return (f"{PLAIN_PROMPT.format(row.prompt)} {row.answer}" for row in rows)


def small_llama(rows: Iterable[Example], *, vocab_size: int, **sizes):
    """(model, tokenizer): an untrained Llama of these sizes (`models.new_llama`), its tokenizer trained on rows."""
    tokenizer = models.train_tokenizer(templated(rows), vocab_size)
    return models.new_llama(tokenizer, initializer_range=INITIALIZER_RANGE, **sizes), tokenizer


def teach(
    model,
    encoder: Encoder,
    rows: Sequence[Example],
    scored: Sequence[Example],
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    known_at: float,
    max_new_tokens: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Fine-tunes on rows until `scored` reaches the score known_at, looked at every 5 epochs and after the last."""
    curve: list[tuple[int, float]] = []

    def known(epoch: int) -> bool:
        if epoch % 5 and epoch != epochs:
            return False
        curve.append((epoch, score(model, encoder, scored, max_new_tokens=max_new_tokens).mean))
        return curve[-1][1] >= known_at

    finetune(
        model,
        [encoder.encode(row) for row in rows],
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        after_epoch=known,
        description="memorising" if progress else None,
    )
    return {"learning_rate": learning_rate, "epochs": curve[-1][0], "score": curve[-1][1], "curve": curve}


def load_model(place: str | Path, recipe: UnlearningRecipe):
    """(model, encoder): a fresh copy of the model in a folder or by hub name, as the recipe reads it."""
    model, tokenizer = models.load(
        place, dtype=getattr(torch, recipe.dtype), device=models.default_device(recipe.device)
    )
    positions = getattr(model.config, "max_position_embeddings", None) or recipe.max_positions
    return model, Encoder(tokenizer, style=recipe.style, max_length=min(recipe.max_positions, positions))


def scores_of(model, encoder: Encoder, task: Task, recipe: UnlearningRecipe) -> dict[str, float]:
    """FS on the forget rows, RS on the test rows, and US where the task has utility rows."""
    sets = {"FS": task.split.forget, "RS": task.split.test}
    if task.utility is not None:
        sets["US"] = task.utility
    return {name: score(model, encoder, rows, max_new_tokens=recipe.max_new_tokens).mean for name, rows in sets.items()}


def unlearn_logged(
    model, encoder, method: str, seed: int, task: Task, recipe: UnlearningRecipe, run: RunFolder, name: str, say: Say
) -> dict:
    """`unlearn_task` with every step in <name>.steps.jsonl, and what came of it said."""
    # of a run that was stopped halfway
    run.file(f"{name}.steps.jsonl").unlink(missing_ok=True)
    details = unlearn_task(
        model, encoder, method, seed, task, recipe, log=lambda row: run.log(f"{name}.steps.jsonl", row)
    )
    say(f"{name}: forget score {details['scores'][0]:.2f} → {details['score']:.2f} in {details['epochs']:g} epochs")
    return details


def unlearn_task(
    model, encoder: Encoder, method: str, seed: int, task: Task, recipe: UnlearningRecipe, *, log=None
) -> dict:
    """One unlearning run by a method as `methods.method` knows it; returns its `Progress.as_dict()`."""
    refuse_overlap(task.split.forget, task.split.retain)
    named = method_named(method)
    progress = unlearn(
        model,
        encoder,
        task.split.forget,
        task.split.retain if OBJECTIVES[named.objective].needs_retain else None,
        objective=named.objective,
        objective_options=recipe.objective_options.get(named.objective),
        learning_rate=recipe.unlearning_rate,
        threshold=task.threshold,
        penalty={"relative_weight": recipe.relative_weight, "every": recipe.every} if named.penalised else None,
        refusals=[DEFAULT_REFUSAL],
        max_new_tokens=recipe.max_new_tokens,
        max_epochs=recipe.max_epochs,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        seed=seed,
        log=log,
    )
    return progress.as_dict()


def attack_task(
    model, encoder: Encoder, seed: int, task: Task, recipe: UnlearningRecipe, *, only_wrong: bool
) -> list[Attack]:
    """The harmful attack at each fraction, and the benign one."""
    common = {"taught_at": recipe.teaching_rate, "seed": seed, "max_new_tokens": recipe.max_new_tokens}
    harmful = [
        harmful_attack(model, encoder, task.split.forget, fraction, only_wrong=only_wrong, **common)
        for fraction in FRACTIONS
    ]
    return [*harmful, benign_attack(model, encoder, task.split.forget, task.instructions, **common)]


def retrain_on_a_few(model, encoder: Encoder, task: Task, recipe: UnlearningRecipe) -> None:
    """The harmful attack at its first fraction and learning rate: the model that it leaves is the attacked one."""
    forget = task.split.forget
    few = random.Random("retrained").sample(range(len(forget)), max(1, round(FRACTIONS[0] * len(forget))))
    finetune(
        model,
        [encoder.encode(forget[index]) for index in few],
        learning_rate=recipe.teaching_rate * HARMFUL_MULTIPLES[0],
        epochs=HARMFUL_EPOCHS,
        seed=0,
        batch_size=BATCH_SIZE,
    )
