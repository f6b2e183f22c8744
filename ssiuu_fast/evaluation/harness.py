"""What else a model still can: tasks of lm-evaluation-harness, where it is installed (the extra `harness`)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch

from ssiuu_fast.evaluation.forwards import evaluating, forward_module
from ssiuu_fast.ranks import Ranks

# utility in the paper's FaithUn table, 500 items each
TASKS = ("mmlu", "gsm8k", "hellaswag", "arc_challenge", "winogrande")
ITEMS = 500
# the first of these that a task has is its accuracy
_ACCURACIES = ("acc,none", "exact_match,strict-match", "exact_match,none")


@dataclass(frozen=True)
class TaskScore:
    """metrics: by the harness's names, "metric,filter". items: how many were asked."""

    items: int
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float:
        """acc, or exact_match with the strict filter, or the task's first metric."""
        name = next((name for name in _ACCURACIES if name in self.metrics), None)
        return self.metrics[name] if name else next(iter(self.metrics.values()))


def harness_scores(
    model, tokenizer, tasks: Sequence[str] = TASKS, items: int = ITEMS, batch_size: int = 16
) -> dict[str, TaskScore]:
    """Scores of each task on its first `items` items; of a group, as mmlu, the items are spread over its members.

    tasks: the harness's names, or paths of its YAML files. Prompts and few-shot examples are the harness's own, without
    a chat template. In several processes every rank runs all of it, and has the result. Raises ImportError where the
    harness is missing, ValueError for a task that it doesn't know.
    """
    lm_eval, manager, wrap = _harness()
    if items < 1:
        raise ValueError(f"items={items}: must be at least 1")
    asked = {task: _first_items(_members(manager, task), items) for task in tasks}
    model = forward_module(model)
    with evaluating(model), _random_states_kept():
        wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = {task: _score(lm_eval, wrapped, manager, task, samples) for task, samples in asked.items()}
    # the harness gives its results to one rank
    return next(scores for scores in Ranks().gather(found) if None not in scores.values())


def require() -> None:
    """Raises ImportError where the harness, or something it needs, is missing."""
    _harness()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds every generator, and a training run may go on after it."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _harness():
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # the harness imports its parts, and what they need, when they are first used
        _ = lm_eval.simple_evaluate
    except ImportError as error:
        missing = error.name or str(error)
        raise ImportError(
            f"tasks of lm-evaluation-harness need {missing}: pip install 'ssiuu-fast[harness]'", name=missing
        ) from error
    return lm_eval, TaskManager(), HFLM


def _members(manager, task: str) -> dict[str, int]:
    """Name and items of each task that a task or group is made of."""
    try:
        loaded = manager.load([task])
    except KeyError:
        raise ValueError(
            f"lm-evaluation-harness has no task {task!r}, and that is no YAML file either; `lm-eval ls tasks` lists all"
        ) from None
    if len(loaded["tasks"]) > 1 and not loaded["groups"]:
        raise ValueError(
            f"{task} is a tag of tasks that have no common score: name some of {', '.join(loaded['tasks'])}"
        )
    return {name: len(member.eval_docs) for name, member in loaded["tasks"].items()}


def _first_items(members: dict[str, int], items: int) -> dict[str, list[int]]:
    """The first items of each member, as evenly as their sizes allow; at least one of each."""
    counts = dict.fromkeys(members, 0)
    # smallest first: what a small member lacks, the larger ones give
    for place, name in enumerate(sorted(members, key=members.__getitem__)):
        share = (items - sum(counts.values())) // (len(members) - place)
        counts[name] = min(members[name], max(1, share))
    return {name: list(range(count)) for name, count in counts.items()}


def _score(lm_eval, wrapped, manager, task: str, samples: dict[str, list[int]]) -> TaskScore | None:
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=[task],
        samples=samples,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    if results is None:
        return None
    by_name = results["results"]
    # a YAML file is known by the name inside it
    row = by_name[task] if task in by_name else by_name[next(iter(samples))]
    metrics = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
    return TaskScore(sum(map(len, samples.values())), metrics)
