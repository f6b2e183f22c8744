"""The stored attributions of neurons that today's are compared with, by module.

NaN stands for an attribution that isn't known yet: the operator leaves such a neuron out, as it must.
"""

import torch
from torch import Tensor

from ssiuu_fast.references import warn_of_another_size


class BatchReferences:
    """A^ref over the whole batch of the step before: [neurons] for each module."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self._samples: int | None = None
        self._warned = False

    def of(self, name: str, sample_ids: None) -> Tensor | None:
        return self.tensors.get(name)

    def take(self, attributions: dict[str, Tensor], samples: int, sample_ids: None) -> None:
        """Stores a step's attributions; what is NaN, or of a module that isn't there, keeps its reference."""
        if self._samples not in (None, samples) and not self._warned:
            self._warned = True
            warn_of_another_size(samples, self._samples)
        self._samples = self._samples or samples
        for name, attribution in attributions.items():
            old = self.tensors.get(name)
            self.tensors[name] = attribution if old is None else torch.where(attribution.isnan(), old, attribution)

    def state_dict(self) -> dict:
        return {"references": dict(self.tensors), "reference_samples": self._samples}

    def load_state_dict(self, state: dict, devices: dict[str, torch.device]) -> None:
        self.tensors = _on_devices(state["references"], devices)
        self._samples = state["reference_samples"]


class SampleReferences:
    """A^ref of each sample at the starting weights: [samples, neurons] for each module, rows by sample id."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[int, int] = {}
        # by set_reference: no other sample is expected then
        self.complete = False

    def of(self, name: str, sample_ids: list[int]) -> Tensor | None:
        """[batch, neurons], NaN where a sample or a neuron isn't known."""
        stored = self.tensors.get(name)
        known = [place for place, sample in enumerate(sample_ids) if sample in self.rows]
        if stored is None or not known:
            return None
        found = stored[[self.rows[sample_ids[place]] for place in known]]
        if len(known) == len(sample_ids):
            return found
        batch = stored.new_full((len(sample_ids), stored.shape[1]), torch.nan)
        batch[known] = found
        return batch

    def take(self, attributions: dict[str, Tensor], samples: int, sample_ids: list[int]) -> None:
        """Stores what isn't known yet, and nothing else."""
        for sample in sample_ids:
            self.rows.setdefault(sample, len(self.rows))
        # a sample may be in a batch twice
        first = {sample: place for place, sample in reversed(list(enumerate(sample_ids)))}
        rows, places = [self.rows[sample] for sample in first], list(first.values())
        for name, attribution in attributions.items():
            self.tensors.setdefault(name, attribution[:0])
        for name, stored in self.tensors.items():
            unknown = stored.new_full((len(self.rows) - len(stored), stored.shape[1]), torch.nan)
            if len(unknown):
                self.tensors[name] = torch.cat([stored, unknown])
        for name, attribution in attributions.items():
            stored = self.tensors[name]
            known = stored[rows]
            stored[rows] = torch.where(known.isnan(), attribution[places], known)

    def state_dict(self) -> dict:
        return {
            "references": dict(self.tensors),
            "reference_ids": list(self.rows),
            "reference_complete": self.complete,
        }

    def load_state_dict(self, state: dict, devices: dict[str, torch.device]) -> None:
        self.tensors = _on_devices(state["references"], devices)
        self.rows = {sample: row for row, sample in enumerate(state["reference_ids"])}
        self.complete = state["reference_complete"]


def _on_devices(saved: dict[str, Tensor], devices: dict[str, torch.device]) -> dict[str, Tensor]:
    return {name: tensor.to(devices[name], copy=True) for name, tensor in saved.items()}
