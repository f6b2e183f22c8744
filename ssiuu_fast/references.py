"""The stored attributions that today's are compared with: one tensor a regularised parameter."""

import math
from collections.abc import Collection, Iterator, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.selection import NamedParameters
from ssiuu_fast.warn import warn_user

EIGHT_BIT = "8bit"
# what references are stored in; None is the parameter's dtype
StateDtype = torch.dtype | str | None
STATE_DTYPES = (None, torch.float32, torch.bfloat16, EIGHT_BIT)
Reference = Tensor | Blockwise8


class References:
    """A^ref of every regularised parameter, and the number of samples whose sum it stands for."""

    def __init__(self, tensors: dict[str, Reference], samples: int | None):
        self._tensors = tensors
        # None: the tensors hold the mean over the forget set, and the size of a step isn't known yet
        self.samples = samples
        self._warned = False
        self._clear = False

    @classmethod
    def empty(cls, parameters: NamedParameters, dtype: StateDtype, samples: int | None) -> "References":
        """Uninitialised ones, for `samples` samples."""
        return cls(empty_references(parameters, dtype), samples)

    @property
    def tensors(self) -> dict[str, Reference]:
        """All of them, to be read and written."""
        return self.at_rest(self._tensors)

    @property
    def kinds(self) -> dict[str, torch.dtype | type]:
        """What each is stored in: a dtype or Blockwise8."""
        return {
            name: Blockwise8 if isinstance(tensor, Blockwise8) else tensor.dtype
            for name, tensor in self._tensors.items()
        }

    def at_rest(self, names: Collection[str]) -> dict[str, Reference]:
        """Those of these names, to be read and written where they are kept."""
        return {name: self._tensors[name] for name in names}

    def bring(self, names: Sequence[str], *, empty: bool) -> Iterator[tuple[Sequence[str], list[Reference]]]:
        """The references of these names where their parameters are, some at a time; `renewed` if they were written.

        empty: they hold nothing yet, and will be written.
        """
        yield names, [self._tensors[name] for name in names]

    def renewed(self, names: Sequence[str]) -> None:
        """What `bring` gave last was written."""
        self._clear = False

    def clear(self, names: Collection[str]) -> None:
        """Attributions that are 0. Of all, once: steps without any attribution leave zeros alone."""
        if self._clear:
            return
        for tensor in self.at_rest(names).values():
            tensor.zero_()
        self._clear = len(names) == len(self._tensors)

    def follow(self, samples: int) -> None:
        """Makes the references stand for a sum over `samples` samples, the size of this step.

        A is a sum, so steps of different sizes can't be compared; a change of size later on is only warned of.
        """
        if self.samples is None:
            for tensor in self.tensors.values():
                (tensor.absmax if isinstance(tensor, Blockwise8) else tensor).mul_(samples)
            self.samples = samples
        elif samples != self.samples and not self._warned:
            self._warned = True
            warn_of_another_size(samples, self.samples)


def warn_of_another_size(samples: int, reference_samples: int) -> None:
    warn_user(
        f"a step of {samples} forget samples is compared with a reference over {reference_samples}: attributions "
        "are sums over the batch: give every step the same number (drop_last, or a sampler that wraps around)"
    )


def required(state: dict, key: str):
    """An entry of a saved state; ValueError where it is missing."""
    if key not in state:
        raise ValueError(f"the saved state has no {key!r}: give what state_dict() of a regulariser returned")
    return state[key]


def refuse_damaged(state: dict) -> None:
    """Raises ValueError where a number or list of a saved state is something else."""
    fine = {
        "settings": lambda value: isinstance(value, dict),
        "step": _is_count,
        "weight": lambda value: value is None or _is_number(value),
        "ratios": lambda value: isinstance(value, list) and all(map(_is_number, value)),
        "reference_samples": lambda value: value is None or _is_count(value),
    }
    for key, is_fine in fine.items():
        if key in state and not is_fine(state[key]):
            raise ValueError(f"the saved state is damaged: its {key!r} is {state[key]!r}")


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def refuse_state_dtype(dtype: StateDtype, parameters: NamedParameters) -> None:
    if dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(map(repr, STATE_DTYPES))}; got {dtype!r}")
    for name, parameter in parameters.items():
        if dtype == EIGHT_BIT and parameter.dtype == torch.float64:
            raise ValueError(f"{name} is torch.float64, whose references have 64 bits: leave state_dtype='8bit' out")


def state_dtype_name(dtype: StateDtype) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def empty_references(parameters: NamedParameters, dtype: StateDtype) -> dict[str, Reference]:
    """Uninitialised references; dtype None takes the parameter's own (fp32 for fp16, whose range A leaves)."""
    if dtype == EIGHT_BIT:
        return {name: Blockwise8.empty_like(parameter) for name, parameter in parameters.items()}
    return {
        name: torch.empty_like(parameter, dtype=_reference_dtype(parameter, dtype), requires_grad=False)
        for name, parameter in parameters.items()
    }


def flat_state(references: dict[str, Reference]) -> dict[str, Tensor]:
    """The references as plain tensors by name, the same memory; of an 8-bit one <name>.codes and <name>.absmax."""
    flat = {}
    for name, reference in references.items():
        if isinstance(reference, Blockwise8):
            flat |= {f"{name}.codes": reference.codes, f"{name}.absmax": reference.absmax}
        else:
            flat[name] = reference
    return flat


def fill_from_flat_state(references: dict[str, Reference], saved: dict[str, Tensor]) -> None:
    """Copies what `flat_state` gave. Raises ValueError where that is of other parameters."""
    ours = flat_state(references)
    missing, unknown = ours.keys() - saved.keys(), saved.keys() - ours.keys()
    if missing or unknown:
        example = min(missing or unknown)
        raise ValueError(
            f"the saved state is of other parameters: {len(missing)} of ours are missing there, {len(unknown)} of its "
            f"own are unknown here, {example!r} for one"
        )
    for name, tensor in ours.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"the saved state has {name} as {list(saved[name].shape)}, this model {list(tensor.shape)}"
            )
    for name, tensor in ours.items():
        tensor.copy_(saved[name])


def _reference_dtype(parameter: nn.Parameter, dtype: torch.dtype | None) -> torch.dtype:
    if parameter.dtype == torch.float64:
        return torch.float64
    if dtype is not None:
        return dtype
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


class MeanAttribution:
    """(1/n) Σ φ · g over batches of a data set, for reference="initial"."""

    def __init__(self, parameters: NamedParameters):
        self._parameters = parameters
        # in 16 bits a long sum stops growing
        self.sums = {name: torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for name, p in parameters.items()}
        self.samples = 0

    @torch.no_grad()
    def add(self, gradients: list[Tensor | None], samples: int) -> None:
        self.samples += samples
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                self.sums[name].add_(parameter.to(_wide(parameter)) * gradient.to(_wide(parameter)))

    def store(self, references: dict[str, Reference]) -> None:
        """Raises ValueError where no batch was added, FloatingPointError where an attribution isn't finite."""
        if not self.samples:
            raise ValueError("set_reference was given no batch: the forget set is empty")
        for name, tensor in self.sums.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"the reference attribution of {name} is not finite: are the starting weights sound?"
                )
        for name, tensor in references.items():
            mean = self.sums[name] / self.samples
            tensor.store(mean) if isinstance(tensor, Blockwise8) else tensor.copy_(mean)


def _wide(parameter: nn.Parameter) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
