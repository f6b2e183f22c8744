"""The penalty on neurons, transcribed with plain autograd: the truth that the taps are tested against."""

import torch
from steps import log_probs_of
from torch import nn

from ssiuu_fast import answer_token_counts


class PlainNeurons:
    """A, R and the gradient of every parameter, step by step; nothing of the package's regulariser is used.

    The gradient of the penalty at h, 2λ·1[A<0]·(A − A_ref)·g, is a constant c there: that of Σ c·h is the same.
    """

    def __init__(
        self, model, weight, *, target="probability", reference="previous", one_sided=False, every=1, modules=None
    ):
        self.model = model
        self.weight = weight
        self.target = target
        self.reference = reference
        self.one_sided = one_sided
        self.every = every
        self.modules = [
            name
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and any(part.isdecimal() for part in name.split("."))
            and (modules is None or name in modules)
        ]
        self.steps = 0
        self.stored = {}
        self.attributions = {}

    def forward(self, rows):
        """(log_probs, counts, {module: output})"""
        outputs = {}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: outputs.__setitem__(name, output)
            )
            for name in self.modules
        ]
        try:
            log_probs = log_probs_of(self.model, rows)
        finally:
            for handle in handles:
                handle.remove()
        return log_probs, answer_token_counts(rows["labels"]), outputs

    def measure(self, log_probs, counts, outputs):
        """({module: A}, {module: g})"""
        total = {
            "probability": lambda: log_probs.exp().sum(),
            "log_probability": lambda: log_probs.sum(),
            "mean_token_probability": lambda: (log_probs / counts).exp().sum(),
        }[self.target]()
        gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True)
        dimension = 1 if self.reference == "initial" else (0, 1)
        g = dict(zip(outputs, gradients, strict=True))
        return {name: (h.detach() * g[name]).sum(dimension) for name, h in outputs.items()}, g

    def set_reference(self, rows, ids):
        attributions, _ = self.measure(*self.forward(rows))
        for name, a in attributions.items():
            self.stored[name] = dict(zip(ids.tolist(), a, strict=True))

    def step(self, rows, ids=None, loss=None):
        """(gradients of the loss and the penalty by parameter, R)"""
        log_probs, counts, outputs = self.forward(rows)
        objective = log_probs.sum() / counts.sum() if loss is None else loss(log_probs)
        penalty = 0.0
        if self.steps % self.every == 0:
            self.attributions, g = self.measure(log_probs, counts, outputs)
            for name, a in self.attributions.items():
                difference = torch.where(a < 0, a - self._reference(name, a, ids), 0.0)
                if self.one_sided:
                    difference = difference.clamp(max=0.0)
                penalty += (difference.double() ** 2).sum().item()
                c = self.weight * self.every * 2 * difference
                c = (c.unsqueeze(1) if self.reference == "initial" else c) * g[name]
                objective = objective + (c * outputs[name]).sum()
        self.steps += 1
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            objective, [self.model.get_parameter(name) for name in names], allow_unused=True
        )
        return dict(zip(names, gradients, strict=True)), penalty

    def _reference(self, name, a, ids):
        if self.reference == "previous":
            old, self.stored[name] = self.stored.get(name, a), a
            return old
        rows = self.stored.setdefault(name, {})
        return torch.stack([rows.setdefault(number, row) for number, row in zip(ids.tolist(), a, strict=True)])
