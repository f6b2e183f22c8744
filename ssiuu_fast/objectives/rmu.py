"""RMU: steers the hidden states of what is to be forgotten to a random direction (arXiv 2403.03218)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.objectives.answer_head import answer_head
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.objectives.modules import TrainedAlone, block_paths, chosen_sites, refuse_patterns
from ssiuu_fast.objectives.objective import ForgetBatch, Objective, State, Totals, require
from ssiuu_fast.objectives.starting_weights import StartingWeights
from ssiuu_fast.objectives.tapped_block import output_of

USUAL_LAYER = 7
# blocks below ℓ whose down projections are trained with its own
BLOCKS_BELOW = 2
_START = "start."


@dataclass
class RepresentationMisdirection(Objective):
    """MSE(h_ℓ(x_f), c·u) + α · MSE(h_ℓ(x_r), h_ℓ^ref(x_r)), in the down projections of blocks ℓ−2 to ℓ alone.

    h_ℓ: [B, T, d], what block ℓ puts out; h^ref of the starting model. MSE: mean over the d dimensions and over all
    tokens of the step that aren't padding, prompts and answers alike, so that the parts of micro-batches and ranks
    sum to it; in fp32 at least. u: uniform in [0,1)^d, then of length 1, drawn once by `prepare`.

    alpha: α, the paper's are 20 to 300. coefficient: c. layer: ℓ, counted from 0; None is 7, and the middle block in
    models that have no block 7. modules: glob patterns over sites ("layers.5.down") or module paths; the weights of
    these modules are trained instead.

    No second model: the starting values of the few trained weights are kept, and put in their place for one forward
    pass without gradient and without dropout in each micro-batch of retain rows.
    """

    name: ClassVar[str] = "RMU"

    alpha: float = 100.0
    coefficient: float = 20.0
    layer: int | None = None
    modules: Sequence[str] | None = None

    # of a prepared one
    _block = _direction = _start = _trained = None

    def __post_init__(self):
        require("alpha", self.alpha, at_least=0)
        require("coefficient", self.coefficient, above=0)
        if self.layer is not None and (type(self.layer) is not int or self.layer < 0):
            raise ValueError(f"layer={self.layer!r}: must be the number of a block, counted from 0")
        refuse_patterns(self.modules)

    def prepare(self, model: nn.Module, forget: Sequence[Encoded], *, seed: int, batch_size: int) -> None:
        places = chosen_sites(model, self.name, ("down",), self.modules)
        blocks = block_paths(model)
        layer = self._layer(blocks)
        if self.modules is None:
            places = {site: place for site, place in places.items() if layer - BLOCKS_BELOW <= site.layer <= layer}
        elif above := [site.text for site in places if site.layer > layer]:
            raise ValueError(f"modules: {above[0]} is above block {layer}, whose output doesn't depend on it")
        weights = {f"{place.path}.weight": place.module.weight.detach().clone() for place in places.values()}
        size = model.config.get_text_config().hidden_size
        direction = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self._begin(model, blocks[layer], direction / direction.norm(), weights)

    def forget_loss(self, model: nn.Module, batch: ForgetBatch, totals: Totals) -> tuple[Tensor, Tensor]:
        self._refuse_unprepared()
        # may run the model, which the block must not see
        answer_head(model, batch.inputs)
        with output_of(model, self._block) as block:
            log_probs = answer_log_probs(model, batch.inputs)
        target = self.coefficient * self._direction.to(block.hidden)
        return _mean_square(block.hidden - target, batch.inputs, totals), log_probs

    def retain_loss(self, model: nn.Module, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
        self._refuse_unprepared()
        # before the graph of this loss exists
        with self._start.in_place(model), output_of(model, self._block) as block:
            block.run(inputs)
        reference = block.hidden
        with output_of(model, self._block) as block:
            block.run(inputs)
        return self.alpha * _mean_square(block.hidden - reference, inputs, totals)

    def release(self, model: nn.Module) -> None:
        if self._trained is not None:
            self._trained.release(model)

    def state_dict(self) -> State:
        """Every rank calls it: weights that are sharded are gathered."""
        self._refuse_unprepared()
        weights = {f"{_START}{name}": tensor for name, tensor in self._start.whole().items()}
        return {"block": self._block, "direction": self._direction, **weights}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str], model: nn.Module) -> None:
        weights = {name.removeprefix(_START): tensor for name, tensor in state.items() if name.startswith(_START)}
        if not weights or not {"block", "direction"} <= state.keys():
            raise ValueError(f"this is no state of RMU: it holds {', '.join(state) or 'nothing'}")
        parameters = dict(model.named_parameters())
        for name, tensor in weights.items():
            found = list(parameters[name].shape) if name in parameters else "none of that name"
            if found != list(tensor.shape):
                raise ValueError(f"RMU's state holds {name} of shape {list(tensor.shape)}, the model has {found}")
        weights = {name: tensor.to(parameters[name], copy=True) for name, tensor in weights.items()}
        self._begin(model, state["block"], state["direction"].cpu(), weights)

    def _begin(self, model: nn.Module, block: str, direction: Tensor, weights: dict[str, Tensor]) -> None:
        self.release(model)
        self._block = block
        self._direction = direction
        self._start = StartingWeights(weights)
        self._trained = TrainedAlone(model, weights)

    def _layer(self, blocks: dict[int, str]) -> int:
        if self.layer is None:
            return USUAL_LAYER if USUAL_LAYER in blocks else sorted(blocks)[len(blocks) // 2]
        if self.layer not in blocks:
            raise ValueError(
                f"layer={self.layer}: the model has blocks {min(blocks)} to {max(blocks)}; leave layer out for "
                f"{USUAL_LAYER}, or the middle one in a model without it"
            )
        return self.layer

    def _refuse_unprepared(self) -> None:
        if self._start is None:
            raise RuntimeError("RMU was not prepared: call prepare(model, forget, seed=, batch_size=) before training")


def _mean_square(difference: Tensor, inputs: dict[str, Tensor], totals: Totals) -> Tensor:
    """This batch's part of the mean over the step's tokens, padding left out, and dimensions."""
    if not totals.attended:
        raise ValueError("RMU takes means over tokens: give Totals their number, attended")
    padding = inputs["attention_mask"].to(difference.device) == 0
    squares = difference.masked_fill(padding[..., None], 0).square().sum()
    return squares / (totals.attended * difference.shape[-1])
