"""What the steps between two logs had: the numbers that go to the Trainer's log beside its own."""

import resource
import sys
import time

import torch
from torch import Tensor

from ssiuu_fast.loop.progress import PENALTY_SHARE, PENALTY_WEIGHT
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.regularizer import SSIUURegularizer


class StepLog:
    """Means over the steps since the last log; of λ the last, since it is 0 while it is being calibrated.

    The penalty's share is a mean over the penalised steps alone: those with λ fixed that `every` doesn't leave out.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._figures: dict[str, list[float]] = {}
        # of the penalised steps; None where it isn't known
        self._penalty_shares: list[float | None] = []
        # sums over micro-batches of this rank's share
        self._shares: dict[str, Tensor] = {}
        self._tokens = 0
        self._steps = 0
        self._since = time.perf_counter()

    def add_share(self, name: str, value: Tensor) -> None:
        """What this rank and micro-batch add to a number that is a sum over all of them."""
        value = value.detach().float()
        self._shares[name] = self._shares[name] + value if name in self._shares else value

    def add_step(self, tokens: int, figures: dict[str, float | None]) -> None:
        """A step that is complete; figures that aren't known are left out."""
        self._steps += 1
        self._tokens += tokens
        if figures.get(PENALTY_WEIGHT):
            self._penalty_shares.append(figures[PENALTY_SHARE])
        for name, value in figures.items():
            if value is not None:
                self._figures.setdefault(name, []).append(value)

    def leave_out(self, seconds: float) -> None:
        """Time that wasn't spent on steps."""
        self._since += seconds

    def drain(self, ranks: Ranks) -> dict[str, float]:
        """The means, tokens a second and peak memory in GB (of this process; on a GPU what tensors took there)."""
        steps, now = max(self._steps, 1), time.perf_counter()
        sums = ranks.sum_(torch.stack(list(self._shares.values()))).tolist() if self._shares else []
        row = {name: value / steps for name, value in zip(self._shares, sums, strict=True)}
        for name, values in self._figures.items():
            row[name] = values[-1] if name == PENALTY_WEIGHT else sum(values) / len(values)
        if None in self._penalty_shares:
            # known in some steps only: no mean to speak of
            row.pop(PENALTY_SHARE, None)
        elif self._penalty_shares:
            row[PENALTY_SHARE] = sum(self._penalty_shares) / len(self._penalty_shares)
        row |= {"tokens_per_second": self._tokens / (now - self._since), "peak_memory_gb": peak_memory(self._device)}
        self._penalty_shares = []
        self._figures, self._shares, self._tokens, self._steps, self._since = {}, {}, 0, 0, now
        return row


def penalty_figures(regularizer: SSIUURegularizer, gradient_norm: float) -> dict[str, float | None]:
    """The last step of a regulariser; gradient_norm is that of the whole gradient before clipping."""
    share = regularizer.penalty_share(gradient_norm)
    if regularizer.step_was_skipped:
        return {PENALTY_SHARE: share, "objective_norm": gradient_norm}
    last = regularizer.last_step
    return {
        "penalty": last.penalty,
        "penalty_norm": last.added_norm,
        # the objective's own norm is known where nothing was added to it
        "objective_norm": gradient_norm if last.added_norm == 0 else None,
        PENALTY_SHARE: share,
        PENALTY_WEIGHT: last.weight,
        "negative_share": last.negative_share,
        "underflows": last.underflows,
        "nonfinite": last.nonfinite,
        "relative_change": last.relative_change,
        "absent": last.absent or None,
    }


def peak_memory(device: torch.device) -> float:
    """GB of 10^9 bytes: tensors on a GPU, or the whole process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
