"""One step's pass over gradient, parameter and reference: of the whole model in one call, or piece by piece."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssiuu_fast.change import ChangeWatch
from ssiuu_fast.ops.penalty import PenaltyResult, penalty_
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.references import Reference, References


class PenaltyPass:
    """Forms the penalty's gradient of each parameter from g, once, and renews its reference.

    parameters: what of each lies on this rank, by name. update: whether references become today's A. first: they hold
    nothing yet. scale: the factor on g; weight: λ before that factor, None while it is being calibrated.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor | nn.Parameter],
        references: References,
        change: ChangeWatch,
        shards: Ranks,
        *,
        update: bool,
        first: bool,
        one_sided: bool,
        scale: float,
        weight: float | None,
        backend: str,
    ):
        self.adds = weight is not None
        self._parameters = parameters
        self.references = references
        self._change = change
        self._shards = shards
        self._update = update
        self._options = {
            "weight": 0.0 if weight is None else weight * scale,
            "one_sided": one_sided,
            "update_references": update,
            "first": first,
            "gradient_scale": 1.0 / scale,
            "backend": backend,
        }
        self._first = first
        self._names: list[str] = []
        self._results: list[PenaltyResult] = []
        self._counts: list[Tensor] = []

    def expect(self, names: Sequence[str]) -> None:
        """The parameters that have a gradient in this step, before any is given."""
        self._change.begin([] if self._first else names, self.references.kinds)

    def add(self, gradients: dict[str, Tensor], outs: Sequence[Tensor | None]) -> None:
        """What is to be added to the loss's gradient: into `outs`, or where that is None in place of g.

        Nothing is added while λ is being calibrated: what is written in place of g is then of no use.
        """
        if not gradients:
            return
        by_name = dict(zip(gradients, outs, strict=True))
        for names, references in self.references.bring(list(gradients), empty=self._first):
            self._form(names, [gradients[name] for name in names], references, [by_name[name] for name in names])
            if self._update:
                self.references.renewed(names)

    def _form(
        self,
        names: Sequence[str],
        gradients: list[Tensor],
        references: list[Reference],
        outs: list[Tensor | None],
    ) -> None:
        parameters = [self._parameters[name] for name in names]
        # before the pass, which overwrites the gradients
        for seen in zip(names, gradients, parameters, references, strict=True):
            self._change.see(*seen, self._options["gradient_scale"])
        counts = torch.zeros(len(names), dtype=torch.int64, device=gradients[0].device)
        result = penalty_(
            gradients,
            parameters,
            references,
            out=outs if self.adds else None,
            nonfinite_counts=counts,
            **self._options,
        )
        self._names += names
        self._results.append(result)
        self._counts.append(counts)

    def close(self) -> tuple[PenaltyResult, list[str], Tensor, Tensor | None]:
        """This rank's sums, the names of the parameters that had a gradient and the non-finite elements of each, and
        what ChangeWatch measured. The others have A = 0 in this step."""
        if self._update:
            self.references.clear(self._parameters.keys() - set(self._names))
        device = self._counts[0].device if self._counts else next(iter(self._parameters.values())).device
        if not self._results:
            none = torch.zeros((), dtype=torch.float64, device=_summable(device))
            zero = torch.zeros((), dtype=torch.int64, device=device)
            result, counts = PenaltyResult(none, zero, none, zero), torch.zeros(0, dtype=torch.int64, device=device)
        elif len(self._results) == 1:
            result, counts = self._results[0], self._counts[0]
        else:
            home = self._results[0].penalty.device
            sums = (torch.stack([part.to(home) for part in field]).sum() for field in zip(*self._results, strict=True))
            result, counts = PenaltyResult(*sums), torch.cat([part.to(device) for part in self._counts])
        return result, self._names, counts, self._change.finish(self._shards)


def _summable(device: torch.device) -> torch.device:
    # MPS has no float64
    return torch.device("cpu") if device.type == "mps" else device
