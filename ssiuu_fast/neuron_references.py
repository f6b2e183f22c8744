"""The stored attributions of neurons that today's are compared with, by module.

NaN stands for an attribution that isn't known yet: the operator leaves such a neuron out, as it must.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.host_copy import to_device
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.references import required, warn_of_another_size

# (name of a module, its output) → its reference, or None where there is none yet
LookUp = Callable[[str, Tensor], Tensor | None]


class Form(NamedTuple):
    """What a module's references are: one number a neuron, fp32 (fp64 for fp64), where its weights are."""

    neurons: int
    dtype: torch.dtype
    device: torch.device


class BatchReferences:
    """A^ref over the whole batch of the step before: [neurons] for each module that was in its graph.

    A module outside the graph has h·g = 0: from the second step on, what isn't stored is 0.
    """

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self._samples: int | None = None
        self._warned = False

    def for_batch(self, sample_ids: None) -> LookUp:
        return self._of

    def _of(self, name: str, hidden: Tensor) -> Tensor | None:
        if self._samples is None or name in self.tensors:
            return self.tensors.get(name)
        return hidden.new_zeros(hidden.shape[-1], dtype=torch.promote_types(hidden.dtype, torch.float32))

    def store(self, attributions: dict[str, Tensor], samples: int, sample_ids: None) -> None:
        """Takes a step's attributions for those of the step before; what is NaN keeps its reference."""
        if self._samples not in (None, samples) and not self._warned:
            self._warned = True
            warn_of_another_size(samples, self._samples)
        old = {name: self._of(name, attribution) for name, attribution in attributions.items()}
        self.tensors = {
            name: attribution if old[name] is None else torch.where(attribution.isnan(), old[name], attribution)
            for name, attribution in attributions.items()
        }
        self._samples = self._samples or samples

    def state_dict(self) -> dict:
        return {"references": dict(self.tensors), "reference_samples": self._samples}

    @classmethod
    def from_state(cls, state: dict, forms: dict[str, Form]) -> "BatchReferences":
        """Raises ValueError where the state doesn't fit the modules."""
        references = cls()
        references.tensors = _loaded(state, forms, lambda form: [form.neurons])
        references._samples = required(state, "reference_samples")
        return references


class SampleReferences:
    """A^ref of each sample at the starting weights: [samples, neurons] for each module, rows by sample id."""

    def __init__(self):
        # with room for more rows at the end
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[int, int] = {}
        # by set_reference: no other sample is expected then
        self.complete = False
        # modules in which nothing is left to be learnt
        self._whole: set[str] = set()
        # samples of which something is; kept only where it has to be told to other ranks
        self._incomplete: set[int] = set()

    def for_batch(self, sample_ids: list[int]) -> LookUp:
        """References are [batch, neurons], NaN where a sample or a neuron isn't known."""
        unknown = [sample not in self.rows for sample in sample_ids]
        index = _OnDevices([self.rows.get(sample, 0) for sample in sample_ids])
        left_out = _OnDevices([[is_unknown] for is_unknown in unknown])

        def of(name: str, hidden: Tensor) -> Tensor | None:
            stored = self.tensors.get(name)
            if stored is None or all(unknown):
                return None
            found = stored[index.on(stored.device)]
            return found.masked_fill_(left_out.on(stored.device), torch.nan) if any(unknown) else found

        return of

    def store(self, attributions: dict[str, Tensor], samples: int, sample_ids: list[int]) -> None:
        """Stores what isn't known yet, and nothing else."""
        attributions = {name: tensor for name, tensor in attributions.items() if name not in self._whole}
        if not attributions:
            return
        for sample in sample_ids:
            self.rows.setdefault(sample, len(self.rows))
        # a sample may be in a batch twice
        first = {sample: place for place, sample in reversed(list(enumerate(sample_ids)))}
        index, places = _OnDevices([self.rows[sample] for sample in first]), _OnDevices(list(first.values()))
        for name, attribution in attributions.items():
            self.tensors.setdefault(name, attribution[:0])
        for name, stored in self.tensors.items():
            self.tensors[name] = _with_room(stored, len(self.rows))
        for name, attribution in attributions.items():
            stored, device = self.tensors[name], attribution.device
            known = stored[index.on(device)]
            stored[index.on(device)] = torch.where(known.isnan(), attribution[places.on(device)], known)

    def lacking(self, sample_ids: list[int]) -> list[int]:
        """Places of the samples of which something is still to be learnt; each sample once."""
        lacking = [sample not in self.rows or sample in self._incomplete for sample in sample_ids]
        first = {sample: place for place, sample in reversed(list(enumerate(sample_ids))) if lacking[place]}
        return sorted(first.values())

    def note_incomplete(self, sample_ids: list[int], modules: int) -> None:
        """Looks which of these samples lack the attribution of a neuron, of so many modules; waits for the device."""
        if not sample_ids:
            return
        if len(self.tensors) < modules:
            self._incomplete.update(sample_ids)
            return
        rows = _OnDevices([self.rows[sample] for sample in sample_ids])
        unknown = [tensor[rows.on(tensor.device)].isnan().any(1).cpu() for tensor in self.tensors.values()]
        for sample, is_unknown in zip(sample_ids, torch.stack(unknown).any(0).tolist(), strict=True):
            (self._incomplete.add if is_unknown else self._incomplete.discard)(sample)

    @classmethod
    def from_pass(cls, batches: list[tuple[list[int], dict[str, Tensor]]]) -> "SampleReferences":
        """Of a pass over the forget set: (sample ids, attributions) of every batch, which are let go of."""
        references = cls()
        references.complete = True
        for sample_ids, _ in batches:
            for sample in sample_ids:
                references.rows[sample] = len(references.rows)
        for name in {name: None for _, attributions in batches for name in attributions}:
            # all of them in one go: grown batch by batch, a large forget set would be copied again and again
            parts = [(ids, attributions.pop(name, None)) for ids, attributions in batches]
            row = next(part for _, part in parts if part is not None)[0]
            whole = all(part is not None for _, part in parts)
            references._whole |= {name} if whole else set()
            references.tensors[name] = torch.cat(
                [row.new_full((len(ids), len(row)), torch.nan) if part is None else part for ids, part in parts]
            )
        return references

    def over_ranks(self, ranks: Ranks, forms: dict[str, Form]) -> "SampleReferences":
        """Of a pass that each rank did over its share of the forget set: the references of all of them.

        Raises ValueError, on every rank, where there is no sample, or one sample in two shares.
        """
        shares = ranks.gather((list(self.rows), list(self.tensors)))
        ids, tensors = gather_samples(shares, self.tensors, forms, ranks, absent=torch.nan)
        if not ids:
            raise ValueError("set_reference was given no batch: the forget set is empty")
        references = SampleReferences()
        for row, sample in enumerate(ids):
            if sample in references.rows:
                raise ValueError(
                    f"set_reference was given sample id {sample} on two ranks: each sample has its own, on one rank"
                )
            references.rows[sample] = row
        references.tensors = tensors
        references._complete()
        references.note_incomplete(ids, len(forms))
        return references

    def _complete(self) -> None:
        self.complete = True
        self._whole = {name for name, tensor in self.tensors.items() if not tensor.isnan().any()}

    def state_dict(self) -> dict:
        rows = len(self.rows)
        return {
            # a part of a tensor would be saved with all of its memory
            "references": {
                name: tensor if len(tensor) == rows else tensor[:rows].clone() for name, tensor in self.tensors.items()
            },
            "reference_ids": list(self.rows),
            "reference_complete": self.complete,
        }

    @classmethod
    def from_state(cls, state: dict, forms: dict[str, Form]) -> "SampleReferences":
        """Raises ValueError where the state doesn't fit the modules."""
        references = cls()
        ids = required(state, "reference_ids")
        references.rows = {sample: row for row, sample in enumerate(ids)}
        if len(references.rows) != len(ids):
            raise ValueError("the saved state has a sample id twice in its 'reference_ids'")
        references.tensors = _loaded(state, forms, lambda form: [len(ids), form.neurons])
        if required(state, "reference_complete"):
            references._complete()
        references.note_incomplete(ids, len(forms))
        return references


def gather_samples(
    shares: list[tuple[list[int], list[str]]],
    attributions: dict[str, Tensor],
    forms: dict[str, Form],
    ranks: Ranks,
    absent: float,
) -> tuple[list[int], dict[str, Tensor]]:
    """(ids, [samples, neurons] by module) of all ranks, in rank order.

    shares: each rank's ids and modules. attributions: of this rank; they are let go of one by one. absent: what stands
    for those of a rank that has no such module.
    """
    counts = [len(ids) for ids, _ in shares]
    gathered = {}
    for name in [name for name in forms if any(name in names for _, names in shares)]:
        form = forms[name]
        part = attributions.pop(name, None)
        if part is None:
            part = torch.full((counts[ranks.rank], form.neurons), absent, device=form.device)
        gathered[name] = ranks.gather_rows(part.to(form.device, form.dtype), counts)
    return [sample for ids, _ in shares for sample in ids], gathered


class _OnDevices:
    """Numbers that the host knows, on every device that asks for them, once."""

    def __init__(self, numbers: list):
        self._numbers = numbers
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            self._tensors[device] = to_device(self._numbers, device)
        return self._tensors[device]


def _with_room(stored: Tensor, rows: int) -> Tensor:
    """At least so many rows, doubled where there are too few: samples come batch by batch."""
    if len(stored) >= rows:
        return stored
    larger = stored.new_full((max(rows, 2 * len(stored)), stored.shape[1]), torch.nan)
    larger[: len(stored)] = stored
    return larger


def _loaded(state: dict, forms: dict[str, Form], shape: Callable[[Form], list[int]]) -> dict[str, Tensor]:
    saved = required(state, "references")
    for name, tensor in saved.items():
        if name not in forms:
            raise ValueError(f"the saved state has references of {name}, which is no tapped module here")
        if list(tensor.shape) != shape(forms[name]):
            raise ValueError(
                f"the saved state has references of {name} as {list(tensor.shape)}, they must be {shape(forms[name])}"
            )
    return {name: tensor.to(forms[name].device, forms[name].dtype, copy=True) for name, tensor in saved.items()}
