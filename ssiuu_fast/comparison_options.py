"""The options of commands for several methods. Docstrings are what `--help` prints; a YAML file has the same names."""

from dataclasses import dataclass
from typing import Literal

from ssiuu_fast.option_checks import require, require_above_zero


@dataclass
class DemoOptions:
    """What the demo runs on.

    Args:
        data: people (invented people, minutes on two cores) or tofu (forget01 with 360 other pairs, up to an hour).
        tofu: folder or hub name of TOFU, for data=tofu.
        instructions: instruction data of the benign attack: exercises (embedded), or a file or hub name of Alpaca's
            form. Left open: exercises with people, tatsu-lab/alpaca with tofu.
        seeds: unlearning runs of each method; a seed has its own order of rows and its own attack sets.
        relative_weight: Ssiuu's penalty relative to the gradient at the start; 30 if left open.
        output: a new folder for everything that is written. Left open: runs/demo-<time>.
        resume: folder of a stopped demo to go on with; its own options are used, and all others here are ignored.
    """

    data: Literal["people", "tofu"] = "people"
    tofu: str = "locuslab/TOFU"
    instructions: str | None = None
    seeds: int = 3
    relative_weight: float | None = None
    output: str | None = None
    resume: str | None = None

    def __post_init__(self):
        require(self, 1, "seeds")


@dataclass
class CompareOptions:
    """Which methods are compared, on which model and rows.

    Args:
        methods: ga, gd and every other objective by its name, each with +ssiuu for the penalty on top; ssiuu is
            gd+ssiuu. With commas between.
        data: people (invented people) or tofu (forget01 with 360 other pairs). Left open: people, or your own rows
            where forget is given.
        tofu: folder or hub name of TOFU, for data=tofu.
        model: folder or hub name of the model. With data it must have been taught that data (an earlier run's folder
            "memorised"); left open, a small one is taught first.
        forget: your own rows to forget, in the forms that unlearn takes.
        retain: rows to keep, same forms.
        test: rows to measure retention on (RS); left open, the retain rows.
        utility: rows that have nothing to do with the forget rows, for a score of their own (US); one source or a list.
        instructions: instruction data of the benign attack: exercises (embedded), or a file or hub name of Alpaca's
            form. Left open: tatsu-lab/alpaca with tofu, else exercises.
        threshold: stop unlearning when the forget score is at or under this. Left open: the data's (see unlearn).
        seeds: runs of each method at its learning rate; a seed has its own order of rows and its own attack sets.
        learning_rates: those that are tried, from the lowest up to the first that reaches the threshold. Left open:
            {1, 2, 5}·10^k from a thousandth of taught_at to ten times it.
        max_epochs: passes over the forget rows at most.
        penalised_max_epochs: the same, for a method with the penalty at the learning rate found for its backbone.
        objective_options: options of objectives by name, for example {npo: {beta: 0.5}}.
        relative_weight: the penalty relative to the gradient at the start.
        every: penalise each k-th step only, k times as much.
        batch_size: forget rows a step, and retain rows as many.
        micro_batch_size: rows at once, to save memory; the result is the same.
        taught_at: learning rate that taught the model; attacks take multiples of it. Left open: what memorize noted in
            the model's folder, else the data's own, else 1e-5.
        style: see unlearn.
        max_length: longest row in tokens; longer ones are cut. Left open: 512, or the data's own.
        dtype: see unlearn.
        device: cpu, cuda, cuda:1, …; left open, a GPU where there is one. Several GPUs each do a run at a time.
        output: a new folder. Left open: runs/compare-<time>.
        resume: folder of a stopped comparison to go on with; its own options are used, and all others are ignored.
    """

    methods: list[str] | str = "ga,gd,dpo,npo,rmu,klue,ssiuu"
    data: Literal["people", "tofu"] | None = None
    tofu: str = "locuslab/TOFU"
    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    test: str | None = None
    utility: list[str] | str | None = None
    instructions: str | None = None
    threshold: float | None = None
    seeds: int = 3
    learning_rates: list[float] | None = None
    max_epochs: int = 20
    penalised_max_epochs: int = 100
    objective_options: dict[str, dict] | None = None
    relative_weight: float = 30.0
    every: int = 1
    batch_size: int = 16
    micro_batch_size: int | None = None
    taught_at: float | None = None
    style: Literal["auto", "chat", "plain"] = "auto"
    max_length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    output: str | None = None
    resume: str | None = None

    def __post_init__(self):
        if isinstance(self.methods, str):
            self.methods = [name.strip() for name in self.methods.split(",") if name.strip()]
        if not self.methods:
            raise ValueError("methods is empty: name those to compare, for example ga,gd,ssiuu")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}")
        require(self, 1, "seeds", "max_epochs", "penalised_max_epochs", "every")
        require(self, 1, "batch_size", "micro_batch_size", "max_length")
        require_above_zero(self, "taught_at", "relative_weight")
        if self.learning_rates is not None:
            for rate in self.learning_rates:
                if not 0 < rate < float("inf"):
                    raise ValueError(f"learning_rates must be numbers above 0, got {rate!r}")
            self.learning_rates = sorted(set(self.learning_rates))
            if not self.learning_rates:
                raise ValueError("learning_rates is empty: leave it out for the usual ones")
        if self.forget is None and (self.retain or self.test):
            raise ValueError("retain and test are of use with forget: your own rows come together")
        if self.forget is not None:
            if self.data is not None:
                raise ValueError(f"give data={self.data} or your own rows (forget), not both")
            if self.model is None:
                raise ValueError("your own rows (forget) need the model that knows them: give model")
            if self.retain is None:
                raise ValueError("give retain: rows that the model is to keep, which most methods train on")
