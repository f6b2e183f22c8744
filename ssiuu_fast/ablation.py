"""Silencing neurons: does a forgotten answer come back without the neurons that hide it?"""

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ssiuu_fast.influence import InfluenceVariation, Neuron
from ssiuu_fast.selection import base_layer


class _Addressed(Protocol):
    module: str
    index: int


@contextmanager
def ablate(model: nn.Module, neurons: Iterable[_Addressed]):
    """Within this context the given neurons put out zero, at every token, in training and in generation.

    neurons: anything with `.module` and `.index`, such as `SpuriousNeuron`: `InfluenceVariation.spurious(m)`. Contexts
    may be nested; when one ends, by an exception or not, its neurons work again. Gradients through a silenced output
    are zero.

    Raises before anything is silenced: ValueError for a path that the model doesn't have or that isn't a linear module,
    an index outside its outputs, or a compiled model, whose code is not traced anew for a hook.
    """
    silenced = _by_module(neurons)
    modules = {path: _linear(model, path, indices) for path, indices in silenced.items()}
    _refuse_compiled(model)
    with ExitStack() as hooks:
        for path, module in modules.items():
            handle = module.register_forward_hook(_Silence(sorted(silenced[path])))
            hooks.callback(handle.remove)
        yield


@dataclass(frozen=True)
class AblationRow:
    """One measurement of `ablation_check`.

    choice: "spurious" (largest D-), "erased" (largest D+), "random", or "none" (nothing silenced, m = 0).
    silenced: how many neurons were; fewer than m where fewer have a D- or D+ above zero.
    """

    choice: str
    m: int
    silenced: int
    seed: int | None
    score: float


def ablation_check(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    variation: InfluenceVariation,
    ms: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[AblationRow]:
    """Does what `score` measures come back when spurious neurons are silenced, and only then?

    score(model) is taken with nothing silenced, then for each m with the m neurons of the largest D-, with the m of the
    largest D+, and once a seed with m random ones of all that were measured, drawn from (seed, m) alone. Knowledge that
    was hidden comes back with the first and not with the others.

    Args:
        model: the model after unlearning; left as it was.
        score: of the forgotten answers, such as `lambda model: scores.score(model, encoder, forget).mean`.
        variation: `influence_variation(before, after)` of this model.
        ms: None is 1, 3, 10, 30, … up to a tenth of the neurons.

    Returns: the rows in that order; numbers and strings only (`dataclasses.asdict` gives JSON).
    Raises ValueError for an m that isn't in 1…number of neurons.
    """
    total = variation.neurons
    ms = log_grid(max(1, total // 10)) if ms is None else list(ms)
    for m in ms:
        if not 1 <= m <= total:
            raise ValueError(f"m={m}: between 1 and {total} neurons can be silenced")
    known: dict[frozenset[Neuron], float] = {}

    def row(choice: str, m: int, neurons: Sequence[_Addressed], seed: int | None = None) -> AblationRow:
        # where fewer neurons than m have a score above zero, the same ones are silenced again
        silenced = frozenset(Neuron(neuron.module, neuron.index) for neuron in neurons)
        if silenced not in known:
            with ablate(model, silenced):
                known[silenced] = float(score(model))
        return AblationRow(choice, m, len(silenced), seed, known[silenced])

    most = max(ms, default=0)
    spurious, erased = variation.spurious(most), variation.erased(most)
    rows = [row("none", 0, [])]
    rows += [row("spurious", m, spurious[:m]) for m in ms]
    rows += [row("erased", m, erased[:m]) for m in ms]
    rows += [row("random", m, _random_neurons(variation, m, seed), seed) for m in ms for seed in seeds]
    return rows


def log_grid(largest: int) -> list[int]:
    """1, 3, 10, 30, 100, … up to `largest`."""
    steps = (factor * 10**power for power in range(len(str(largest))) for factor in (1, 3))
    return [step for step in steps if step <= largest]


def _random_neurons(variation: InfluenceVariation, m: int, seed: int) -> list[Neuron]:
    places = random.Random(f"{seed} {m}").sample(range(variation.neurons), m)
    return [variation.neuron_at(place) for place in places]


def _by_module(neurons: Iterable[_Addressed]) -> dict[str, set[int]]:
    silenced: dict[str, set[int]] = {}
    for neuron in neurons:
        silenced.setdefault(neuron.module, set()).add(int(neuron.index))
    return silenced


def _linear(model: nn.Module, path: str, indices: Iterable[int]) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"the model has no module {path!r}: were these neurons found in another model, or is it wrapped?"
        ) from None
    outputs = _outputs(module)
    if outputs is None:
        raise ValueError(f"{path} is {type(module).__name__}, not a linear module: its outputs can't be silenced")
    for index in indices:
        if not 0 <= index < outputs:
            raise ValueError(f"{path} has outputs 0 to {outputs - 1}, not {index}")
    return module


def _outputs(module: nn.Module) -> int | None:
    """How many neurons a linear module has; adapters (LoRA) around it don't change that."""
    linear = base_layer(module)
    # GPT-2's Conv1D calls it nf
    outputs = getattr(linear, "out_features", getattr(linear, "nf", None))
    return outputs if isinstance(outputs, int) else None


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                "the model is compiled, and its code doesn't see neurons silenced now: load it without torch.compile"
            )


class _Silence:
    """A forward hook that puts zero in place of some outputs."""

    def __init__(self, indices: list[int]):
        self._indices = torch.tensor(indices)

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        # where the module runs is known only now (device_map, offloading)
        self._indices = self._indices.to(output.device)
        # filled, not multiplied: what isn't finite is silenced too
        return output.index_fill(-1, self._indices, 0)
