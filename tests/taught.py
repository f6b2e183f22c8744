"""A small model that knows a few invented people, for the tests of loops and attacks."""

from dataclasses import replace

from ssiuu_fast import models
from ssiuu_fast.data import people
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.experiment import PEOPLE, Task, memorise

RECIPE = replace(
    PEOPLE,
    hidden_size=48,
    layers=2,
    vocab_size=512,
    teaching_rate=5e-3,
    teaching_batch_size=16,
    teaching_epochs=60,
    known_at=0.9,
    unlearning_rate=1e-3,
    max_epochs=20,
)


def small_task() -> Task:
    split = people.generate(10).split(forget_people=3, retain_people=5)
    return Task(split, people.instructions(40), threshold=0.33, chance=1 / 3)


def teach_into(folder):
    return memorise(small_task(), RECIPE, folder, progress=False)


def load_taught(folder):
    model, tokenizer = models.load(folder)
    return model, Encoder(tokenizer, max_length=RECIPE.max_positions)
