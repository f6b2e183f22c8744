"""Twenty and more wrong configurations: one clear error each, before a weight is changed."""

import os

import pytest
import torch
from tiny import tiny_llama
from unlearners import config, equal, probability, rows, trainer, weights

from ssiuu_fast.adapters import add_lora
from ssiuu_fast.data.example import Example
from ssiuu_fast.trainer import UnlearningTrainer

REFUSED_OPTIONS = {
    "unknown objective": ({"objective": "gdd"}, "unknown objective 'gdd'; known: ga, gd"),
    "unknown option of the objective": ({"objective_options": {"beta": 1}}, "objective 'gd' has no option 'beta'"),
    "option out of its range": ({"objective": "npo", "objective_options": {"beta": 0}}, "beta=0: must be"),
    "lomo": ({"optim": "lomo"}, "optim='lomo' steps inside the backward pass"),
    "adalomo": ({"optim": "adalomo"}, "optim='adalomo' steps inside the backward pass"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, "'galore_adamw_layerwise' steps inside the backward pass"),
    "Liger": ({"use_liger_kernel": True}, "use_liger_kernel=True: its kernels overwrite saved tensors"),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "reentrant checkpointing can't give the gradient of the target",
    ),
    "weight and relative_weight": ({"weight": 1.0, "relative_weight": 30.0}, "give one of them"),
    "unknown target": ({"target": "logit"}, "target must be one of 'probability'.*got 'logit'"),
    "unknown granularity": ({"granularity": "layer"}, "granularity must be one of.*got 'layer'"),
    "unknown reference": ({"reference": "last"}, "reference must be one of.*got 'last'"),
    "unknown state_dtype": ({"state_dtype": "4bit"}, "state_dtype must be one of.*got '4bit'"),
    "unknown style": ({"style": "loud"}, "style must be one of.*got 'loud'"),
    "few bits for neurons": ({"granularity": "neuron", "state_dtype": "8bit"}, "state_dtype='8bit' is of no use"),
    "host memory for neurons": ({"granularity": "neuron", "offload": True}, "offload=True is of no use with gran"),
    "host memory under FSDP2": ({"fsdp": True, "offload": True}, "offload=True under FSDP2: it keeps whole"),
    "neurons, previous, accumulation": (
        {"granularity": "neuron", "gradient_accumulation_steps": 2},
        "sums over the whole batch: use 1, or reference='initial'",
    ),
    "neurons compiled": (
        {"granularity": "neuron", "torch_compile": True},
        "torch_compile with granularity='neuron': taps are forward hooks",
    ),
    "neurons sharded": (
        {"granularity": "neuron", "fsdp": True, "fsdp_config": {"version": 2}},
        "granularity='neuron' under FSDP2 without weight.*Give weight",
    ),
    "neurons sharded, relative weight": (
        {"granularity": "neuron", "relative_weight": 3.0, "fsdp": True, "fsdp_config": {"version": 2}},
        "granularity='neuron' under FSDP2 without weight",
    ),
    "DeepSpeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed is not supported: its engine owns"),
    "FSDP1": ({"fsdp": True, "fsdp_config": {"version": 1}}, "flat parameters can't be regularised.*use FSDP2"),
    "FSDP2 with gradient sync off": (
        {
            "fsdp": True,
            "gradient_accumulation_steps": 2,
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}},
        },
        "sync_each_batch=False under FSDP2",
    ),
    "best model by another metric": (
        {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": "epoch"},
        "ends with the weights of its lowest forget score anyway",
    ),
    "learning rate by a metric": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        "lr_scheduler_type='reduce_lr_on_plateau' changes the learning rate by a metric.*use 'constant'",
    ),
    "learning rate by a metric, without one": (
        {"lr_scheduler_type": "greedy", "threshold": None, "eval_strategy": "no"},
        "lr_scheduler_type='greedy' changes the learning rate by a metric",
    ),
    "threshold that nothing is compared with": ({"eval_strategy": "no"}, "threshold=0.0 with eval_strategy='no'"),
    "batch size by trial": ({"auto_find_batch_size": True}, "attributions are sums over them"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "max_length of 1": ({"max_length": 1}, "max_length=1: must be at least 2"),
    "every of 0": ({"every": 0}, "every=0: must be at least 1"),
}


@pytest.mark.parametrize("options, message", REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS)
def test_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_neurons_under_fsdp2_by_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="granularity='neuron' under FSDP2 without weight"):
        config(tmp_path, granularity="neuron")
    assert config(tmp_path, granularity="neuron", weight=0.5).sharded
    assert config(tmp_path, granularity="neuron", regularize=False).sharded
    assert config(tmp_path, relative_weight=3.0).sharded


def test_deepspeed_by_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported"):
        config(tmp_path)


def half():
    return tiny_llama(torch.float16)


def reentrant():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


# keyword arguments of the trainer, options, message
REFUSED_DATA = {
    "no retain set for GD": ({"retain": None}, {}, "GD needs retain rows and there are none"),
    "no refusals for DPO": ({}, {"objective": "dpo"}, "DPO needs texts to refuse with"),
    "refusals without questions": (
        {"refusals": ["I can't answer."]},
        {"objective": "dpo"},
        "give forget rows as texts",
    ),
    "threshold with no evaluation set": ({"forget_score": None}, {}, "threshold=0.0 with no evaluation set"),
    "nothing to forget": ({"forget": []}, {}, "the forget set is empty"),
    "nothing to retain": ({"retain": []}, {}, "the retain set is empty"),
    "a row in both sets": ({"retain": rows(10)[:3]}, {}, "forget set and retain set share 3 tokenised row"),
    "text without a tokenizer": ({"forget": [Example("a", "b")]}, {}, "row 0 of the forget set: is a text"),
    "no labels": ({"forget": [{"input_ids": [1, 2]}]}, {}, "row 0 of the forget set: has input_ids and no labels"),
    "no answer": ({"forget": [{"input_ids": [1, 2], "labels": [2, -100]}]}, {}, "has no answer token"),
    "not a row": ({"retain": [3]}, {}, "row 0 of the retain set: is a int|row 0 of the retain set: is a text"),
    "fewer rows than micro-batches": (
        {"forget": rows(3)},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "3 forget rows for 4 micro-batches",
    ),
    "fp16 weights with target probability": ({"model": half}, {}, "is float16 with target='probability'"),
    "reentrant checkpointing that the model brings along": (
        {"model": reentrant},
        {},
        "reentrant gradient checkpointing can't give the gradient of the target",
    ),
}


@pytest.mark.parametrize("given, options, message", REFUSED_DATA.values(), ids=REFUSED_DATA)
def test_data_and_model(tmp_path, given, options, message):
    parts = {"forget": rows(10), "retain": rows(7, seed=1), "forget_score": probability} | given
    model = parts.pop("model", tiny_llama)()
    with pytest.raises(ValueError, match=message):
        UnlearningTrainer(model, config(tmp_path, **options), **parts)


# found when the model is wrapped, before the first step
REFUSED_MODELS = {
    "patterns that match nothing": ({"regularized_parameters": ["*nothing*"]}, "nothing"),
    "8 bits for fp64": ({"state_dtype": "8bit"}, "leave state_dtype='8bit' out"),
}


@pytest.mark.parametrize("options, message", REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_before_the_first_step(tmp_path, options, message):
    run = trainer(tmp_path, **options)
    before = weights(run.model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0 and equal(weights(run.model), before)


# found when adapters are put on, before there is a trainer
REFUSED_ADAPTERS = {
    "LoRA targets that match nothing": (
        {"targets": ["c_attn"]},
        "no linear module is named c_attn; this model has q_pr",
    ),
    "no LoRA targets": ({"targets": []}, r"no linear module is named \(nothing given\)"),
    "LoRA targets as one string": ({"targets": "q_proj"}, "must be a list of names, got the string 'q_proj'"),
}


@pytest.mark.parametrize("options, message", REFUSED_ADAPTERS.values(), ids=REFUSED_ADAPTERS)
def test_adapters(options, message):
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank=2, **options)
    assert equal(weights(model), before) and all(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_with_hooks_that_step(tmp_path):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: None)
    with pytest.raises(ValueError, match="optimizers that step inside backward"):
        trainer(tmp_path, model=model).train()


def test_other_arguments(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="args is a TrainingArguments: give an UnlearningConfig"):
        UnlearningTrainer(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True), forget=rows(3))


def test_evaluate_scores_its_own_rows(tmp_path):
    with pytest.raises(ValueError, match="leave eval_dataset out"):
        trainer(tmp_path).evaluate(rows(3))
