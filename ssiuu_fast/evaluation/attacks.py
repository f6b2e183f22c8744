"""Retraining attacks: does a little fine-tuning bring the forgotten answers back?

Harmful: fine-tune on a fraction of the forget set itself, score the disjoint rest. Benign: fine-tune on unrelated
instructions, score the forget set. Each at several learning rates, multiples of the one that taught the model; what is
reported is the highest score seen (METHOD, "Protocol of the experiments" and open point 8).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch import nn

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.training import finetune

HARMFUL_MULTIPLES = (1.0, 0.5, 0.1)
HARMFUL_EPOCHS = 10
BENIGN_MULTIPLES = (1.0, 0.1, 0.01)
BENIGN_SCORED_EVERY = 8
BATCH_SIZE = 16
# an item answered with a score of at least this counts as known, and is left out of a harmful attack's pool
ANSWERED = 0.5


@dataclass(frozen=True)
class Attack:
    """One attack's outcome. before: the score on the same rows just before it; curves: learning rate → scores seen."""

    name: str
    trained_on: int
    scored_on: int
    before: float
    curves: dict[float, list[float]]

    @property
    def recovered(self) -> float:
        """The highest score seen at any learning rate, after any number of steps."""
        return max(max(scores) for scores in self.curves.values())

    def as_dict(self) -> dict:
        return asdict(self) | {"recovered": self.recovered, "curves": {str(lr): s for lr, s in self.curves.items()}}


def harmful_attack(
    model: nn.Module,
    encoder: Encoder,
    forget: Sequence[Example],
    fraction: float,
    *,
    taught_at: float,
    seed: int,
    only_wrong: bool = True,
    max_new_tokens: int = 200,
    progress: bool = False,
) -> Attack:
    """Fine-tunes on round(fraction · n) forget rows for 10 epochs, scoring the disjoint rest after every epoch.

    only_wrong: the paper's pool rule for multiple choice: rows with options that are still answered rightly are neither
    trained on nor scored, so that the score before the attack is 0. Rows scored by ROUGE-L all stay in the
    pool. taught_at: the learning rate that taught the model; the attack takes 1, 0.5 and 0.1 of it. The model
    ends with the weights that it came with. Raises ValueError where the pool can't be split in two.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    starting = score(model, encoder, forget, max_new_tokens=max_new_tokens).values
    pool = [
        index
        for index, example in enumerate(forget)
        if not (only_wrong and example.false_options and starting[index] >= ANSWERED)
    ]
    count = max(1, round(fraction * len(forget)))
    if count >= len(pool):
        raise ValueError(
            f"a harmful attack with {fraction:g} of {len(forget)} forget rows trains on {count}, and only {len(pool)} "
            "are in its pool: none would be left to score. Has the model forgotten enough? (only_wrong=False, "
            "--only_wrong false, takes every row)"
        )
    random.Random(f"harmful {fraction} {seed}").shuffle(pool)
    trained, rest = pool[:count], [forget[index] for index in sorted(pool[count:])]
    rows = [encoder.encode(forget[index]) for index in trained]
    before = sum(starting[index] for index in pool[count:]) / len(rest)
    curves = {}
    for learning_rate in _rates(taught_at, HARMFUL_MULTIPLES):
        scores: list[float] = []
        with restored(model):
            finetune(
                model,
                rows,
                learning_rate=learning_rate,
                epochs=HARMFUL_EPOCHS,
                seed=seed,
                batch_size=BATCH_SIZE,
                after_epoch=_collect(scores, model, encoder, rest, max_new_tokens),
                description=f"harmful {fraction:g}, lr {learning_rate:.0e}" if progress else None,
            )
        curves[learning_rate] = scores
    return Attack(f"harmful_{fraction:g}", count, len(rest), before, curves)


def benign_attack(
    model: nn.Module,
    encoder: Encoder,
    forget: Sequence[Example],
    instructions: Sequence[Example],
    *,
    taught_at: float,
    seed: int,
    max_new_tokens: int = 200,
    progress: bool = False,
) -> Attack:
    """Fine-tunes on unrelated instructions for one epoch, scoring the forget set every 8 steps and at the end.

    taught_at: the learning rate that taught the model; the attack takes 1, 0.1 and 0.01 of it. The model ends
    with the weights that it came with.
    """
    if not instructions:
        raise ValueError("the benign attack has no instructions to train on")
    rows = [encoder.encode(example) for example in instructions]
    steps = -(-len(rows) // BATCH_SIZE)
    before = score(model, encoder, forget, max_new_tokens=max_new_tokens).mean
    curves = {}
    for learning_rate in _rates(taught_at, BENIGN_MULTIPLES):
        scores: list[float] = []
        look = _collect(scores, model, encoder, forget, max_new_tokens)
        with restored(model):
            finetune(
                model,
                rows,
                learning_rate=learning_rate,
                epochs=1,
                seed=seed,
                batch_size=BATCH_SIZE,
                after_step=lambda step, loss, look=look: _look_sometimes(step, steps, look),
                description=f"benign, lr {learning_rate:.0e}" if progress else None,
            )
        curves[learning_rate] = scores
    return Attack("benign", len(rows), len(forget), before, curves)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Gives the model its weights back at the end, whatever happened inside."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(weights)
        model.zero_grad(set_to_none=True)


def _rates(taught_at: float, multiples: Sequence[float]) -> list[float]:
    if not taught_at > 0:
        raise ValueError(f"the learning rate that taught the model must be above 0, got {taught_at}")
    return [taught_at * multiple for multiple in multiples]


def _collect(scores: list[float], model, encoder: Encoder, rows, max_new_tokens: int) -> Callable[[int], bool]:
    def look(_: int) -> bool:
        try:
            scores.append(score(model, encoder, rows, max_new_tokens=max_new_tokens).mean)
        except FloatingPointError:
            # retraining broke the model: nothing comes back from it
            scores.append(0.0)
        return False

    return look


def _look_sometimes(step: int, steps: int, look: Callable[[int], bool]) -> None:
    if step % BENIGN_SCORED_EVERY == 0 or step == steps:
        look(step)
