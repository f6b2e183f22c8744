"""Which runs a comparison of methods needs: for each the search of its learning rate, then its seeds, then attacks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ssiuu_fast.experiment import BEFORE
from ssiuu_fast.methods import method as method_named


@dataclass(frozen=True)
class Job:
    """One run: an unlearning of a method, or the attacks on what it left. Of `before` the model as it was taught."""

    what: Literal["unlearn", "attack"]
    label: str
    learning_rate: float
    seed: int

    @property
    def file(self) -> str:
        name = f"{self.label}-{self.learning_rate!r}-{self.seed}"
        return name if self.what == "unlearn" else f"{name}.attacks"

    @property
    def attack(self) -> "Job":
        return replace(self, what="attack")

    @property
    def unlearning(self) -> "Job":
        """The unlearning that it attacks."""
        return replace(self, what="unlearn")


BEFORE_JOB = Job("unlearn", BEFORE, 0.0, 0)


@dataclass(frozen=True)
class Line:
    """A line of the table. backbone: the method whose learning rate it takes, where it doesn't find its own."""

    label: str
    method: str
    max_epochs: int
    backbone: str | None = None


@dataclass(frozen=True)
class Sweep:
    """What is compared. rates: the learning rates that are tried, lowest first; seeds: runs at the one that is found.

    A penalised method has two lines (METHOD, open point 8): at its own rate under the same max_epochs as all others,
    and at the rate that was found for its backbone, with up to penalised_max_epochs.
    """

    methods: tuple[str, ...]
    seeds: int
    rates: tuple[float, ...]
    max_epochs: int = 20
    penalised_max_epochs: int = 100

    @property
    def lines(self) -> list[Line]:
        lines = []
        for name in self.methods:
            lines.append(Line(name, name, self.max_epochs))
            named = method_named(name)
            if named.penalised:
                label = f"{name}@{named.objective}"
                lines.append(Line(label, name, self.penalised_max_epochs, backbone=named.objective))
        return lines

    def line(self, label: str) -> Line:
        """The line of this label; a backbone that is not itself compared has one too, for its search."""
        found = next((line for line in self.lines if line.label == label), None)
        return found or Line(label, label, self.max_epochs)

    def search(self, line: Line, done: Mapping[Job, dict]) -> Iterator[Job]:
        """The unlearnings of the first seed, from the lowest rate to the first that reached (or isn't done yet)."""
        for rate in self.rates:
            job = Job("unlearn", line.label, rate, 0)
            yield job
            if job not in done or "error" in done[job] or reached(done[job]):
                return

    def rate(self, line: Line, done: Mapping[Job, dict]) -> float | None:
        """The learning rate of this line, once it is known."""
        if line.backbone is not None:
            return self.rate(self.line(line.backbone), done)
        return next((job.learning_rate for job in self.search(line, done) if job in done and reached(done[job])), None)

    def runs(self, line: Line, done: Mapping[Job, dict]) -> list[Job]:
        """The unlearnings whose results the line shows: one a seed, once its rate is known."""
        rate = self.rate(line, done)
        return [] if rate is None else [Job("unlearn", line.label, rate, seed) for seed in range(self.seeds)]

    def ready(self, done: Mapping[Job, dict]) -> list[Job]:
        """Every job that can run now: searches in front, since others wait for them, attacks last.

        The model before unlearning comes first and alone: where it knows nothing of the forget set, nothing can be
        compared.
        """
        if BEFORE_JOB not in done:
            return [BEFORE_JOB]
        searched = [*self.lines, *map(self.line, self._backbones())]
        # penalised runs take the longest
        searched.sort(key=lambda line: not method_named(line.method).penalised)
        searches = [job for line in searched if line.backbone is None for job in self.search(line, done)]
        runs = [job for line in self.lines for job in self.runs(line, done)]
        attacks = [job.attack for job in [BEFORE_JOB, *runs] if job in done and reached(done[job])]
        return [*searches, *runs, *attacks]

    def _backbones(self) -> list[str]:
        """Those that give a rate to others without being compared themselves."""
        wanted = dict.fromkeys(line.backbone for line in self.lines if line.backbone is not None)
        return [name for name in wanted if name not in self.methods]


def reached(result: Mapping) -> bool:
    """Whether an unlearning run ended at the threshold, by its result; the model before unlearning counts as such."""
    return "error" not in result and result["unlearning"].get("reached", True)


def learning_rates(taught_at: float) -> tuple[float, ...]:
    """{1, 2, 5}·10^k from a thousandth of the rate that taught the model up to ten times that rate."""
    lowest = math.floor(math.log10(taught_at)) - 4
    ladder = [float(f"{digit}e{lowest + power}") for power in range(7) for digit in (1, 2, 5)]
    slack = 1 + 1e-6
    return tuple(rate for rate in ladder if taught_at * 1e-3 <= rate * slack and rate <= taught_at * 10 * slack)
