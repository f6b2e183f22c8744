"""Plain fine-tuning."""

import torch
from tiny import tiny_llama
from unlearners import rows

from ssiuu_fast.training import finetune


def test_a_model_is_left_as_its_next_trainer_wants_it():
    model = tiny_llama()
    before = model.get_input_embeddings().weight.detach().clone()
    assert finetune(model, rows(5), learning_rate=1e-3, epochs=2, seed=0, batch_size=2) == 6
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
