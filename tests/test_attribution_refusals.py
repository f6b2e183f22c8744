"""What attribute() refuses, with the reason; and that nothing has changed then."""

from types import SimpleNamespace

import pytest
import torch
from neurons import Residual
from tiny import batch, tiny_llama, tiny_model
from torch import nn

from ssiuu_fast import attribute


def refused(match, model=None, batches=None, error=ValueError, **options):
    model = tiny_llama() if model is None else model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        attribute(model, [batch()] if batches is None else batches, **options)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def changed(rows, **tensors):
    return [{name: tensor for name, tensor in (rows | tensors).items() if tensor is not None}]


def test_names_of_target_and_positions():
    refused("target='loss': must be one of probability, .*logit_difference", target="loss")
    refused("positions='last': must be one of all, prompt, answer, no_bos", positions="last")


def test_batches():
    rows = batch()
    refused("there is no batch", batches=[])
    refused("no 'attention_mask'", batches=changed(rows, attention_mask=None))
    refused(r"labels must be \[5, 9\], got \[5, 8\]", batches=changed(rows, labels=rows["labels"][:, 1:]))
    refused("no 'distractors', one token id a sample", target="logit_difference")
    labels = rows["labels"].clone()
    labels[3] = -100
    refused("sample 3 has no answer token", batches=changed(rows, labels=labels))
    refused("sample 8 has no answer token", batches=[rows, *changed(rows, labels=labels)])
    mask = rows["attention_mask"].clone()
    mask[2] = (torch.arange(9) < 2).long()
    refused("sample 2 has a label on a token that is not attended", batches=changed(rows, attention_mask=mask))
    refused(
        "sample 0 has no token that counts under positions='prompt'",
        batches=changed(rows, labels=rows["input_ids"], attention_mask=torch.ones_like(rows["input_ids"])),
        positions="prompt",
    )


def test_distractors_that_are_the_answer():
    rows = batch()
    first = (rows["labels"] != -100).int().argmax(1)
    gold = rows["labels"].gather(1, first[:, None])[:, 0]
    distractors = torch.where(torch.arange(5) == 4, gold, (gold + 1) % 48)
    refused(
        "sample 4 has a distractor equal to its answer's first token",
        batches=changed(rows, distractors=distractors),
        target="logit_difference",
    )


def test_patterns():
    refused("the pattern 'layers.9.Q' fits none of the 14 sites", modules=["layers.9.Q"])
    refused(r"got the string 'layers.0.Q': write \['layers.0.Q'\]", modules="layers.0.Q")
    refused("modules is empty", modules=[])


def test_unknown_names():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.extra = nn.Linear(2, 2)
    refused(
        r"LlamaForCausalLM has 2 linear modules in blocks .*: model.layers.0.mlp.extra, model.layers.1.mlp.extra. Give "
        r"patterns .* modules=\['model.layers.0.mlp.extra'\]",
        model,
    )
    refused("Sequential has no linear module in a numbered block", nn.Sequential())


def test_two_modules_of_one_site():
    model = tiny_llama()
    model.tower = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})])
    refused("model.layers.0.self_attn.q_proj and tower.0.self_attn.q_proj are both layers.0.Q", model)
    assert attribute(model, [batch()], modules=["model.layers.*"]).samples == 5


def test_fused_experts():
    model = tiny_model("qwen3_moe", torch.float32, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    refused(r"experts.* has shape \[4, .*fused experts", model)
    # what can be read is read when asked for
    assert len(attribute(model, [batch()], modules=["layers.*.[QKVO]"]).max) == 8


def test_modules_of_liger():
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("LigerSwiGLUMLP", (type(mlp),), {"__module__": "liger_kernel.transformers.swiglu"})
    refused(r"model\.layers\.0\.mlp \(LigerSwiGLUMLP\) comes from liger_kernel, which overwrites", model)


def test_outputs_overwritten_in_place():
    refused("writes into the output of a tapped module in place", Residual(in_place=True), modules=["layers.*"])
    assert attribute(Residual(in_place=False), [batch()], modules=["layers.*"]).samples == 5


def test_a_module_used_twice():
    model = tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    refused(r"model\.layers\.0\.mlp\.down_proj was used twice in one forward pass", model)


def test_a_module_never_used():
    model = Residual(in_place=False)
    model.layers.append(nn.Linear(6, 6))
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=model.head(model.layers[0](model.embedding(input_ids)))
    )
    refused(r"3 of 4 tapped modules took no part .*the first is layers\.1\)", model, modules=["layers.*"])


def test_reentrant_checkpointing():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    refused("use_reentrant': False", model)


def test_compiled_inside():
    model = tiny_llama()
    model.model.layers[1].compile()
    refused(r"model\.layers\.1 is compiled: .* before torch.compile$", model)


def test_outputs_that_are_not_samples_by_tokens():
    class Flat(Residual):
        def forward(self, input_ids, attention_mask):
            flat = self.layers[0](self.embedding(input_ids).flatten(0, 1))
            return SimpleNamespace(logits=self.head(flat).unflatten(0, input_ids.shape))

    refused(r"layers\.0 puts out \[45, 6\] for samples and tokens of \[5, 9\]", Flat(False), modules=["layers.0"])


def test_attributions_that_are_not_finite():
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    refused("sample 0 has attributions that aren't finite", model)
