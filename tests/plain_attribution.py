"""Attribution transcribed with plain autograd, one sample and one target at a time: the truth for attribute()."""

import torch


def target_of(logits, labels, target, distractor=None):
    """T of one sample from logits [T, V] and labels [T], by METHOD."""
    places = [t for t in range(1, len(labels)) if labels[t] != -100]
    steps = [logits[t - 1].log_softmax(-1)[labels[t]] for t in places]
    if target == "probability":
        return torch.stack([step.exp() for step in steps]).prod()
    if target == "log_probability":
        return sum(steps)
    if target == "mean_token_probability":
        return (sum(steps) / len(steps)).exp()
    at_answer = logits[places[0] - 1]
    return at_answer[labels[places[0]]] - at_answer[distractor]


def outputs_and_gradients(model, row, modules, target="probability"):
    """{module path: (h, ∂T/∂h)}, [T, N] each, for one sample without padding: row holds [T] tensors."""
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        logits = model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    value = target_of(logits, row["labels"], target, row.get("distractors"))
    gradients = torch.autograd.grad(value, list(outputs.values()))
    return {name: (h.detach()[0], g[0]) for (name, h), g in zip(outputs.items(), gradients, strict=True)}


def unpadded(batch):
    """The samples of a batch, one by one, without their padding."""
    for index, mask in enumerate(batch["attention_mask"].bool()):
        yield {name: value[index][mask] if value.dim() == 2 else value[index] for name, value in batch.items()}


def plain_means(model, batches, modules, target="probability", counts=lambda row: slice(None)):
    """{module path: (mean max, mean max(max, 0), mean min)}; counts(row): which tokens of a sample count."""
    model.eval()
    found = {name: [] for name in modules}
    for batch in batches:
        for row in unpadded(batch):
            for name, (h, g) in outputs_and_gradients(model, row, modules, target).items():
                attribution = (h * g)[counts(row)]
                largest, smallest = attribution.amax(0), attribution.amin(0)
                found[name].append(torch.stack([largest, largest.clamp(min=0), smallest]))
    return {name: torch.stack(rows).mean(0).unbind() for name, rows in found.items()}


def linear_modules(model):
    """Paths of the linear modules in blocks."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and any(part.isdecimal() for part in name.split("."))
    ]
