"""answer_log_probs: formed in the model's head where that is the same, from its logits where it isn't."""

import gc
import logging
import warnings
import weakref

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from steps import assert_close, gradients
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutput

from ssiuu_fast.objectives import answer_head as module
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.answer_head import answer_head
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.objectives.objective import ForgetBatch, Totals
from ssiuu_fast.planning.live_memory import LiveMemory

ROWS = batch(seed=1)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).train()


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def frozen_head(model):
    model.lm_head.requires_grad_(False)
    return model


def llama(**config):
    return exactly(tiny_llama(**config))


def formed_in_head(log_probs):
    """Whether HiddenLogProbs is in the graph."""
    nodes, seen = [log_probs.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert ("HiddenLogProbsBackward" in names) != ("SequenceLogProbsBackward" in names)
    return "HiddenLogProbsBackward" in names


SAME = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "frozen head": lambda: frozen_head(llama()),
    "checkpointing": lambda: checkpointed(llama()),
    "qwen2": lambda: exactly(tiny_model("qwen2")),
    "gpt2": tiny_gpt2,
    # its head has a bias
    "phi": lambda: tiny_model("phi"),
    "lora": lambda: lora(llama()),
    "lora, tied": lambda: lora(llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"]),
    "granite, its scale 1": lambda: exactly(tiny_model("granite", logits_scaling=1.0)),
    "gemma 2, not capped": lambda: tiny_model("gemma2", final_logit_softcapping=None),
}
OTHER = {
    "gemma 2": lambda: tiny_model("gemma2", final_logit_softcapping=1.0),
    "granite": lambda: exactly(tiny_model("granite", logits_scaling=8.0)),
    "cohere": lambda: tiny_model("cohere"),
    "lora on the head": lambda: lora(llama(), target_modules=["q_proj", "lm_head"]),
    "the head trained beside lora": lambda: lora(llama(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_gradients_are_those_of_the_logits(name):
    torch.manual_seed(0)
    model = (SAME | OTHER)[name]()
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    expected = log_probs_of(model, ROWS)
    (expected @ weights).backward()
    truth = gradients(model)
    model.zero_grad()
    found = answer_log_probs(model, ROWS)
    assert formed_in_head(found) == (name in SAME)
    assert found.shape == (5,) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    # once for the penalty, once for the loss
    torch.autograd.grad(found.sum(), [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    (found @ weights).backward()
    with_gradient = {name: gradient for name, gradient in truth.items() if gradient is not None}
    # Gemma's norms are in fp32, so that a last bit of what comes back to them is one of those
    bound = 1e-6 if name == "gemma 2, not capped" else 1e-9
    assert_close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, with_gradient, bound)


@pytest.mark.parametrize("tied", [False, True])
def test_under_distributed_data_parallel_that_looks_for_the_unused(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    log_probs_of(model, ROWS).sum().backward()
    truth = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for find_unused in (True, False):
            model.zero_grad()
            wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
            for _ in range(2):
                log_probs = answer_log_probs(wrapped, ROWS)
                assert formed_in_head(log_probs)
                log_probs.sum().backward()
            assert_close({name: p.grad / 2 for name, p in model.named_parameters()}, truth)
    finally:
        torch.distributed.destroy_process_group()


def test_under_autocast_with_outputs_in_fp32():
    """As accelerate wraps the forward of a model that trains in mixed precision."""
    model = tiny_llama(torch.float32)
    expected = []
    for form in (log_probs_of, answer_log_probs):
        model.zero_grad()
        if form is answer_log_probs:
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
            log_probs = form(model, ROWS)
            assert formed_in_head(log_probs)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                log_probs = form(model, ROWS)
        log_probs.sum().backward()
        expected.append((log_probs.detach(), gradients(model)))
    (logits, of_logits), (found, of_found) = expected
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert_close(of_found, of_logits, 2e-2)


def test_the_logits_never_exist():
    model = tiny_llama(torch.float32, vocab_size=8000)
    answer_head(model, ROWS)
    largest = []
    for form in (log_probs_of, answer_log_probs):
        with LiveMemory() as memory:
            form(model, ROWS).sum().backward()
        largest.append(memory.peak)
        model.zero_grad()
    # 14 of 45 tokens are of answers: their logits and the exponentials of them, for all logits and their gradient
    logits = 4 * ROWS["labels"].numel() * 8000
    assert largest[0] - largest[1] > logits


def test_the_model_is_asked_once_and_nothing_moves():
    model = tiny_llama(attention_dropout=0.5)
    calls, state, training = [], torch.get_rng_state(), [m.training for m in model.modules()]
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for _ in range(3):
        assert answer_head(model, ROWS) is model.lm_head
    assert calls == [False, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert "forward" not in vars(model.lm_head)
    assert all(p.grad is None for p in model.parameters())
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_what_is_put_on_the_model_later_counts():
    model = tiny_llama()
    assert answer_head(model, ROWS) is model.lm_head
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert answer_head(model, ROWS) is None
    handle.remove()
    assert answer_head(model, ROWS) is model.lm_head
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert answer_head(model, ROWS) is None


def test_an_error_leaves_the_head_as_it_was():
    model = tiny_llama()
    wrong = ROWS | {"labels": torch.full_like(ROWS["labels"], 48)}
    assert answer_head(model, ROWS) is not None
    with pytest.raises(ValueError, match="label 48 is outside the vocabulary of 48"):
        answer_log_probs(model, wrong)
    assert answer_head(model, ROWS) is model.lm_head
    torch.testing.assert_close(answer_log_probs(model, ROWS), log_probs_of(model, ROWS))


def in_place(model):
    """Writes into its logits."""
    forward = type(model).forward.__get__(model)

    def changed(**inputs):
        outputs = forward(**inputs)
        outputs.logits[..., :3] = -1e4
        return outputs

    model.forward = changed
    return model


def of_known_width(model):
    """Adds nothing, but to logits of all words alone."""
    forward = type(model).forward.__get__(model)

    def changed(**inputs):
        outputs = forward(**inputs)
        outputs.logits = outputs.logits.view(*outputs.logits.shape[:2], 48)
        return outputs

    model.forward = changed
    return model


def twice(model):
    """Its head also looks at what is before the blocks."""
    forward = type(model).forward.__get__(model)

    def changed(**inputs):
        model.lm_head(model.model.embed_tokens(inputs["input_ids"]))
        return forward(**inputs)

    model.forward = changed
    return model


def past_its_head(model):
    """Takes the head's weight and leaves the head out."""

    def changed(input_ids, attention_mask, use_cache):
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=hidden @ model.lm_head.weight.T)

    model.forward = changed
    return model


def compiled(model):
    model.compile(backend="eager")
    return model


REASONS = {
    "they aren't what its head gives": [
        OTHER["gemma 2"],
        OTHER["granite"],
        lambda: in_place(llama()),
        lambda: twice(llama()),
        lambda: past_its_head(llama()),
    ],
    "it can't do with less (shape '[1, 1, 48]' is invalid for input of size 1)": [lambda: of_known_width(llama())],
    "its head is a Linear": [OTHER["lora on the head"]],
    "its head is a ModulesToSaveWrapper": [OTHER["the head trained beside lora"]],
    "it is compiled": [lambda: compiled(llama())],
}


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, some in REASONS.items() for make in some])
def test_the_reason_for_logits_is_said_once(caplog, reason, make):
    model = make()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert answer_head(model, ROWS) is None and answer_head(model, ROWS) is None
    (said,) = [record.message for record in caplog.records if record.name == module.__name__]
    assert "formed from its whole logits" in said and said.endswith(f": {reason}")


def test_sharded_models_and_others_give_logits(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(module, "sharded_modules", lambda model: [model])
    assert answer_head(model, ROWS) is None

    class Other(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.undo()
    assert answer_head(Other(), ROWS) is None
    assert not formed_in_head(answer_log_probs(Other(), ROWS))


def test_rmu_sees_its_block_run_once():
    model = exactly(tiny_llama(num_hidden_layers=3))
    objective = make_objective("rmu", layer=2)
    objective.prepare(model, [], seed=0, batch_size=2)
    _, log_probs = objective.forget_loss(model, ForgetBatch(ROWS, 5), Totals(5, 14, attended=40))
    assert formed_in_head(log_probs)
