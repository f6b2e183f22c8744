"""The plug-in for OpenUnlearning, against a stub of its registry in tests/openunlearning."""

import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import batch, log_probs_of, part, tiny_llama

PLUGIN = Path(__file__).parent.parent / "examples" / "openunlearning"
STUB = Path(__file__).parent / "openunlearning"
ROWS = 24
MICRO = 2
LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def registry():
    """Their package of trainers after our launcher has run their main."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(STUB)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["train.py", "trainer=SSIUU"])
        runpy.run_path(str(PLUGIN / "train.py"), run_name="__main__")
        yield sys.modules["trainer"]
    for name in set(sys.modules) - before:
        if name == "ssiuu" or name.split(".")[0] == "trainer":
            del sys.modules[name]


def test_the_launcher_registers_before_their_main_runs(registry):
    assert registry.SEEN["trainers"] == {"GradDiff", "NPO", "SSIUU", "SSIUUNPO"}
    assert registry.SEEN["arguments"] == ["--config-dir", str(PLUGIN / "configs"), "trainer=SSIUU"]


def test_the_launcher_wants_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="from the root of an OpenUnlearning checkout"):
        runpy.run_path(str(PLUGIN / "train.py"), run_name="__main__")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name, options", [("SSIUU", {"relative_weight": None, "weight": 1e6}), ("SSIUUNPO", {})])
def test_same_weights_as_a_plain_loop(registry, tmp_path, name, options, accumulate):
    ours, trainer = train(registry, tmp_path, name, options, accumulate)
    options = config(name)["method_args"]["regularizer"] | options
    expected = plain_loop(name, options["relative_weight"], options["weight"], accumulate)
    assert trainer.state.global_step == ROWS // (MICRO * accumulate)
    assert distance(ours, expected) < 1e-6
    # and it isn't the loss alone that moved them
    assert distance(ours, plain_loop(name, None, 0.0, accumulate)) > 1e-2
    logged = trainer.state.log_history[-2]
    assert logged["penalty"] > 0 and logged["weight"] > 0 and 0 < logged["negative_share"] < 1
    assert logged["underflows"] == 0


def test_without_a_weight_it_is_their_own_trainer(registry, tmp_path):
    ours, _ = train(registry, tmp_path, "SSIUU", {"relative_weight": None, "weight": 0.0})
    theirs, _ = train(registry, tmp_path, "GradDiff", None)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_step_that_an_epoch_can_not_fill_is_refused(registry, tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=13, but an epoch has only 12 batches"):
        train(registry, tmp_path, "SSIUU", {}, accumulate=13)


def config(name):
    return yaml.safe_load((PLUGIN / "configs" / "trainer" / f"{name}.yaml").read_text())


def train(registry, folder, name, options, accumulate=1):
    """The weights after one epoch, and the trainer; options: changes to those of the method's config file."""
    method = {} if options is None else config(name)["method_args"]
    if options is not None:
        method = method | {"regularizer": method["regularizer"] | options}
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    handler = name if options is None else config(name)["handler"]
    model = tiny_llama()
    pairs = [{"forget": part(forget(), i, i + 1), "retain": part(retain(), i, i + 1)} for i in range(ROWS)]
    trainer, _ = registry.load_trainer({"handler": handler, "args": args, "method_args": method}, model, pairs, collate)
    trainer.train()
    return weights(model), trainer


def collate(pairs):
    return {
        side: {name: torch.cat([pair[side][name] for pair in pairs]) for name in pairs[0][side]} for side in pairs[0]
    }


def forget():
    return batch(ROWS, seed=3)


def retain():
    return batch(ROWS, seed=4)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a, b):
    """The largest difference, relative to how far the weights moved."""
    start = weights(tiny_llama())
    moved = max((b[name] - start[name]).abs().max() for name in b)
    return max((a[name] - b[name]).abs().max() for name in b) / moved


def plain_loop(name, relative_weight, weight, accumulate):
    """Algorithm 1 in a loop of its own, over the same rows in the same order."""
    model = tiny_llama()
    regularised = [p for name, p in model.named_parameters() if "_proj" in name]
    previous, ratios, size = None, [], MICRO * accumulate
    for start in range(0, ROWS, size):
        model.zero_grad()
        summed = [torch.zeros_like(p) for p in regularised]
        for first in range(start, start + size, MICRO):
            rows, others = part(forget(), first, first + MICRO), part(retain(), first, first + MICRO)
            log_probs = log_probs_of(model, rows)
            for total, g in zip(
                summed, torch.autograd.grad(log_probs.exp().sum(), regularised, retain_graph=True), strict=True
            ):
                total += g
            if name == "SSIUU":
                forget_loss = log_probs.sum() / (rows["labels"][:, 1:] != -100).sum()
            else:
                forget_loss = -2 * torch.nn.functional.logsigmoid(-log_probs).mean()
            ((forget_loss + model(**others).loss) / accumulate).backward()
        attributions = [p.detach() * g for p, g in zip(regularised, summed, strict=True)]
        if previous is not None:
            added = [
                2 * torch.where(a < 0, a - b, 0.0) * g for a, b, g in zip(attributions, previous, summed, strict=True)
            ]
            if relative_weight is None:
                penalise(regularised, added, weight)
            elif len(ratios) == 4:
                penalise(regularised, added, relative_weight * statistics.median(ratios))
            else:
                ratios.append(norm([p.grad for p in regularised]) / norm(added))
        previous = attributions
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for p in model.parameters():
                p -= LEARNING_RATE * p.grad
    return weights(model)


def penalise(parameters, added, weight):
    for p, gradient in zip(parameters, added, strict=True):
        p.grad += weight * gradient


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
