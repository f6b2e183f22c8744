"""KLUE: gradient difference in the few FFN neurons that carry the knowledge, and no others."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssiuu_fast.attribution import attribute
from ssiuu_fast.data.collate import IGNORE, Encoded, asked_with, length_sorted_batches
from ssiuu_fast.engines import bare
from ssiuu_fast.objectives.log_probs import GradientDifference
from ssiuu_fast.objectives.modules import FFN_KINDS, TrainedAlone, chosen_sites, refuse_patterns
from ssiuu_fast.objectives.objective import ForgetBatch, State, Totals, require
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shards import local_part, sharded_along
from ssiuu_fast.sites import Place, Site

_ROWS = "rows."


@dataclass
class LocalisedDifference(GradientDifference):
    """KLUE: GD that moves only the FFN neurons with the largest I (METHOD has the form).

        I(x,y) = A(x,y) − w · mean over N questions x' with other answers of A(x',y)
        A = mean over the forget set of max_k h·∂P(y|x)/∂h        of each output neuron of gate, up and down

    A neuron that supports y after any question belongs to the answer's words, not to the fact. x' are drawn from
    (seed, index of the row) among the forget rows with another answer. Moving: the neuron's row of its weight and its
    bias; everything else in the model stays as it is, bit for bit. Measured once, by `prepare`, at the starting
    weights.

    This is our reading of the paper, not checked against its code: none was found.

    gamma, alpha: γ and α of GD. others_weight: w, the paper's α. others: N. share: of the FFN neurons, rounded, one at
    least. modules: glob patterns over sites ("layers.*.up") or module paths, the modules whose neurons are looked at
    instead.
    """

    name: ClassVar[str] = "KLUE"

    others_weight: float = 10.0
    others: int = 5
    share: float = 0.1
    modules: Sequence[str] | None = None

    # of a prepared one: {module path: its neurons that move}
    _rows = _trained = None

    def __post_init__(self):
        super().__post_init__()
        require("others_weight", self.others_weight, at_least=0)
        if type(self.others) is not int or self.others < 1:
            raise ValueError(f"others={self.others!r}: must be a whole number of questions, at least 1")
        require("share", self.share, above=0)
        if self.share > 1:
            raise ValueError(f"share={self.share!r}: must be a part of the neurons, above 0 and at most 1")
        refuse_patterns(self.modules)

    def refuse(self, arguments) -> None:
        if arguments.weight_decay:
            raise ValueError(
                f"weight_decay={arguments.weight_decay} would shrink the rows that KLUE must leave as they are: set "
                "weight_decay=0"
            )

    def prepare(self, model: nn.Module, forget: Sequence[Encoded], *, seed: int, batch_size: int) -> None:
        places = chosen_sites(model, self.name, FFN_KINDS, self.modules)
        pairs = other_questions(forget, self.others, seed)
        sites = [site.text for site in places]
        own, other = (
            attribute(model, (batch for _, batch in length_sorted_batches(rows, batch_size)), modules=sites).max
            for rows in (forget, pairs)
        )
        importance = {site: own[site].double() - self.others_weight * other[site].double() for site in places}
        # measured on every rank, but rounding may differ between them
        rows = Ranks().gather({path: rows.tolist() for path, rows in self._largest(importance, places).items()})[0]
        self._begin(model, {path: torch.tensor(numbers) for path, numbers in rows.items()})

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        self._refuse_unprepared()
        return super().forget_loss(model, batch, totals)

    def finish_gradients(self, model: nn.Module) -> None:
        """Zeroes the gradient of every row that stays."""
        self._refuse_unprepared()
        for path in self._rows:
            module = bare(model).get_submodule(path)
            for name, parameter, dimension in _by_neuron(module):
                if parameter.grad is not None:
                    staying = self._staying(path, name, parameter, dimension)
                    local_part(parameter.grad).masked_fill_(staying, 0)

    def release(self, model: nn.Module) -> None:
        if self._trained is not None:
            self._trained.release(model)

    def state_dict(self) -> State:
        self._refuse_unprepared()
        return {f"{_ROWS}{path}": rows for path, rows in self._rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str], model: nn.Module) -> None:
        rows = {name.removeprefix(_ROWS): tensor.cpu() for name, tensor in state.items() if name.startswith(_ROWS)}
        if not rows or len(rows) < len(state):
            raise ValueError(f"this is no state of KLUE: it holds {', '.join(state) or 'nothing'}")
        modules = dict(model.named_modules())
        for path, numbers in rows.items():
            width = _width(modules[path]) if path in modules else 0
            if int(numbers.max()) >= width:
                raise ValueError(
                    f"KLUE's state moves neuron {int(numbers.max())} of {path}, which has {width} in this model"
                )
        self._begin(model, rows)

    def _begin(self, model: nn.Module, rows: dict[str, Tensor]) -> None:
        self.release(model)
        self._rows = rows
        self._masks: dict[str, Tensor] = {}
        self._trained = TrainedAlone(
            model, [f"{path}.{name}" for path in rows for name, *_ in _by_neuron(model.get_submodule(path))]
        )

    def _largest(self, importance: dict[Site, Tensor], places: dict[Site, Place]) -> dict[str, Tensor]:
        """{module path: its neurons among the `share` with the largest I of all}; of equal ones the first in order."""
        everything = torch.cat([importance[site] for site in places])
        count = max(1, round(self.share * len(everything)))
        chosen = torch.zeros(len(everything), dtype=torch.bool)
        chosen[everything.sort(descending=True, stable=True).indices[:count]] = True
        rows: dict[str, list[Tensor]] = {}
        for site, some in zip(places, chosen.split([len(importance[site]) for site in places]), strict=True):
            columns = torch.arange(_width(places[site].module))[places[site].columns]
            rows.setdefault(places[site].path, []).append(columns[some])
        whole = {path: torch.cat(parts).sort().values for path, parts in rows.items()}
        return {path: numbers for path, numbers in whole.items() if len(numbers)}

    def _staying(self, path: str, name: str, parameter: nn.Parameter, dimension: int) -> Tensor:
        """True on this rank's part of the rows that stay, to be broadcast over the parameter's."""
        key = f"{path}.{name}"
        if key not in self._masks:
            staying = torch.ones(parameter.shape[dimension], dtype=torch.bool)
            staying[self._rows[path]] = False
            staying = sharded_along(parameter, dimension, staying)
            self._masks[key] = staying[:, None] if dimension == 0 and parameter.dim() == 2 else staying
        return self._masks[key]

    def _refuse_unprepared(self) -> None:
        if self._rows is None:
            raise RuntimeError("KLUE was not prepared: call prepare(model, forget, seed=, batch_size=) before training")


def other_questions(rows: Sequence[Encoded], others: int, seed: int) -> list[Encoded]:
    """For each row `others` questions of rows with another answer, drawn from (seed, its index), with its answer.

    None is longer than the longest row. Raises ValueError where a row has too few.
    """
    longest = max((len(row.input_ids) for row in rows), default=0)
    answers = [tuple(label for label in row.labels if label != IGNORE) for row in rows]
    pairs = []
    for index, row in enumerate(rows):
        candidates = [other for other in range(len(rows)) if answers[other] != answers[index]]
        if len(candidates) < others:
            raise ValueError(
                f"forget row {index} has {len(candidates)} rows with another answer, and KLUE compares each with "
                f"others={others} of them: give more forget rows, or a smaller number of others"
            )
        drawn = random.Random(f"{seed} {index}").sample(candidates, others)
        pairs += [asked_with(rows[other], row, longest) for other in drawn]
    if not pairs:
        raise ValueError("the forget set is empty: KLUE measures on it which neurons may move")
    return pairs


def _by_neuron(module: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    """Name, parameter and the dimension that counts output neurons, of weight and bias of a linear module."""
    # GPT-2's is [in, out]
    weight = ("weight", module.weight, 1 if type(module).__name__ == "Conv1D" else 0)
    return [weight] if module.bias is None else [weight, ("bias", module.bias, 0)]


def _width(module: nn.Module) -> int:
    _, weight, dimension = _by_neuron(module)[0]
    return weight.shape[dimension]
