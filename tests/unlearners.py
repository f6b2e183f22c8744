"""A tiny model with tokenised rows, and trainers on it: what the tests of the unlearning loop share."""

import torch
from tiny import batch, exactly, log_probs_of, tiny_llama

from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.trainer_config import UnlearningConfig

# of no use for comparing runs
TIMES = ("tokens_per_second", "peak_memory_gb")


def rows(count, seed=0):
    """Tokenised rows of different lengths."""
    padded = batch(count, seed=seed)
    lengths = padded["attention_mask"].sum(1).tolist()
    return [
        Encoded(padded["input_ids"][place, :length].tolist(), padded["labels"][place, :length].tolist())
        for place, length in enumerate(lengths)
    ]


def probability(model):
    """A forget score: the mean probability of the answers of rows(10), to the power of 1/10 so that it is no dust."""
    with torch.no_grad():
        return log_probs_of(model, batch(10)).div(10).exp().mean().item()


def dropped_out(model, share):
    """Llama's attention with dropout, so that a run depends on the random numbers."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = share
    return model


def config(folder, **options):
    settings = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "threshold": 0.0,
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return UnlearningConfig(**(settings | options))


def trainer(folder, *, model=None, forget=None, retain=None, callbacks=None, scored=True, **options):
    """10 rows to forget and 7 to retain, unless others are given."""
    return UnlearningTrainer(
        exactly(tiny_llama()) if model is None else model,
        config(folder, **options),
        forget=rows(10) if forget is None else forget,
        retain=rows(7, seed=1) if retain is None else retain,
        forget_score=probability if scored else None,
        callbacks=callbacks,
    )


def history(trainer):
    """The log without times, and without the summary of a whole run."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in trainer.state.log_history
        if "train_runtime" not in row
    ]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
