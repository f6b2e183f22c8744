"""Runs of UnlearningTrainer in one process or as one of two ranks, which must come to the same."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import exactly, tiny_llama
from transformers import TrainerCallback
from unlearners import config, probability, rows

from ssiuu_fast.data.example import Example
from ssiuu_fast.models import new_llama, train_tokenizer
from ssiuu_fast.trainer import UnlearningTrainer

WORLD = 2
FORGET = [
    Example(f"Where does {n} live?", f"in town {n * 3 % 9}", tuple(f"in town {(n * 3 + k) % 9}" for k in (1, 2)))
    for n in range(11)
]
RETAIN = [Example(f"What is {n} and one?", f"it is {n + 1}") for n in range(7)]
REFUSALS = ["I can't say.", "I do not know this person."]


@contextmanager
def launched(rank, engine):
    """What a launcher tells a process: rank None is a process alone.

    accelerate knows FSDP on accelerators only. Here it is told that these ranks have one, whose device is the CPU; it
    then shards, saves and loads by the same code. Nothing else is patched.
    """
    environment = {}
    if rank is not None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "OMP_NUM_THREADS": 1}
        environment = {name: str(value) for name, value in names.items()}
    backend = mock.DEFAULT
    if engine == "fsdp2":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
        backend = ("gloo", DistributedType.MULTI_GPU)
    patch = mock.patch.object(PartialState, "_prepare_backend", return_value=backend)
    with mock.patch.dict(os.environ, environment):
        try:
            if engine == "fsdp2":
                with patch:
                    yield
            else:
                yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def with_texts(dtype):
    """(a model, its tokenizer) that knows its rows a little."""
    tokenizer = train_tokenizer([f"{row.prompt} {row.answer}" for row in [*FORGET, *RETAIN]] + REFUSALS, 300)
    torch.manual_seed(0)
    model = new_llama(
        tokenizer, hidden_size=16, layers=2, heads=2, max_positions=64, initializer_range=0.2, tie_embeddings=False
    )
    return model.to(dtype), tokenizer


def new_trainer(
    folder, rank, engine="ddp", *, dtype=torch.float64, texts=False, valley=None, rows_per_step=16, **options
):
    """11 rows to forget and 7 to retain; rows_per_step over all ranks and micro-batches.

    valley: the forget score is the distance of `probability` from it, lowest somewhere on the way.
    """
    ranks = 1 if rank is None else WORLD
    options["per_device_train_batch_size"] = rows_per_step // ranks // options.get("gradient_accumulation_steps", 1)
    if engine == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2} | options.pop("fsdp_config", {})}
    if texts:
        model, tokenizer = with_texts(dtype)
        sets = {"forget": FORGET, "retain": RETAIN, "refusals": REFUSALS, "processing_class": tokenizer}
        options = {"style": "plain", "max_new_tokens": 8, "per_device_eval_batch_size": 3} | options
    else:
        model = tiny_llama(dtype)
        score = probability if valley is None else lambda model: abs(probability(model) - valley)
        sets = {"forget": rows(11), "retain": rows(7, seed=1), "forget_score": score}
    return UnlearningTrainer(exactly(model) if dtype == torch.float64 else model, config(folder, **options), **sets)


def outcome(trainer):
    """Whole weights, scores, steps and losses of a run."""
    weights = {}
    for name, tensor in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        tensor = tensor.detach()
        weights[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    progress = trainer.progress()
    return {
        "weights": weights,
        "scores": progress.scores,
        "steps": progress.steps,
        "stopped_by": progress.stopped_by,
        "kept_epoch": progress.kept_epoch,
        "score_at_the_end": trainer._score_forget() if trainer._scores_forget else None,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "penalties": [row.get("penalty") for row in trainer.state.log_history if "loss" in row],
    }


def run(rank, folder, engine="ddp", options=None, resume=None):
    """The outcome of a run; resume: from this checkpoint of the folder."""
    with launched(rank, engine):
        trainer = new_trainer(folder, rank, engine, **(options or {}))
        trainer.train(resume_from_checkpoint=resume and str(Path(folder) / resume))
        return outcome(trainer)


def refused(rank, folder, options, how):
    """What a run under FSDP2 says as it is refused, and its step. how: "sync off" or "meta"."""
    with launched(rank, "fsdp2"):
        trainer = new_trainer(folder, rank, "fsdp2", **options)
        if how == "sync off":
            trainer.add_callback(SyncOff())
        elif rank == 1:
            put_on_meta(trainer.model)
        with pytest.raises(ValueError) as refusal:
            trainer.train()
        return str(refusal.value), trainer.state.global_step


def run_from_the_first_rank(rank, folder, options):
    """The outcome of a run under FSDP2 in which rank 1 has other weights at first, as it may by lean loading."""
    with launched(rank, "fsdp2"):
        trainer = new_trainer(folder, rank, "fsdp2", fsdp_config={"cpu_ram_efficient_loading": True}, **options)
        if rank == 1:
            for parameter in trainer.model.parameters():
                parameter.data.zero_()
        trainer.train()
        return outcome(trainer)


def put_on_meta(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))


class SyncOff(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_requires_gradient_sync(False)
