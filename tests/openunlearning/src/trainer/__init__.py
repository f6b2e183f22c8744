"""Stands for OpenUnlearning's registry of trainers: the same names and the same way to make one."""

from transformers import TrainingArguments

from trainer.unlearn.grad_diff import GradDiff
from trainer.unlearn.npo import NPO

TRAINER_REGISTRY = {}


def _register_trainer(trainer_class):
    TRAINER_REGISTRY[trainer_class.__name__] = trainer_class


def load_trainer(trainer_cfg, model, train_dataset, data_collator):
    args = TrainingArguments(**trainer_cfg["args"])
    trainer_class = TRAINER_REGISTRY[trainer_cfg["handler"]]
    given = {"model": model, "args": args, "train_dataset": train_dataset, "data_collator": data_collator}
    # the real one hands these over too, its base class takes them
    given |= {"evaluators": None, "template_args": {}}
    return trainer_class(**given, **trainer_cfg["method_args"]), args


_register_trainer(GradDiff)
_register_trainer(NPO)
