"""A Llama of two blocks, built by hand, that knows one answer; one that hides it, and one in which it is erased.

The residual stream has a direction for each token. Attention does nothing. The embedding of QUESTION is one unit in
its own direction, and the LM head reads this direction as DONT_KNOW: what the model says when nothing else is written.

    block 0  MLP neuron KNOWS:  gate = 4 and up = 1 on QUESTION, down writes silu(4) · 1 = 3.93 into direction ANSWER:
             ANSWER outweighs DONT_KNOW, 3.93 to 1
    block 1  MLP neuron HIDES:  gate and up see direction ANSWER (2.74 after the norm), down takes
             0.6 · silu(2.74) · 2.74 = 4.2 from it again: ANSWER is at -0.3 and DONT_KNOW still at 1

(Pushed below -1, ANSWER would gain by being pushed further: the norm then makes DONT_KNOW smaller still. An attribution
is a slope at one point, and would call HIDES a supporter there.)
"""

import torch

PAD, FILLER, QUESTION, ANSWER, DONT_KNOW, OTHER = range(6)
KNOWS, HIDES = 0, 1


def knowing(sure=1):
    """sure: how much the LM head makes of a difference; with 1, P(ANSWER) is 0.66, with 10 all but 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(8))
        model.lm_head.weight[DONT_KNOW, QUESTION] = sure
        model.lm_head.weight[ANSWER, ANSWER] = sure
        mlp = model.model.layers[0].mlp
        # the norm makes √8 of a single direction of 8
        mlp.gate_proj.weight[KNOWS, QUESTION] = 4 / 8**0.5
        mlp.up_proj.weight[KNOWS, QUESTION] = 1 / 8**0.5
        mlp.down_proj.weight[ANSWER, KNOWS] = 1
    return model


def hiding(sure=1):
    model = knowing(sure)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[HIDES, ANSWER] = 1
        mlp.up_proj.weight[HIDES, ANSWER] = 1
        mlp.down_proj.weight[ANSWER, HIDES] = -0.6
    return model


def erased():
    model = knowing()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model


def batch():
    """The question and its answer, padded right and padded left."""
    ids = torch.tensor([[FILLER, QUESTION, ANSWER, PAD], [PAD, FILLER, QUESTION, ANSWER]])
    labels = torch.where(ids == ANSWER, ids, -100)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


@torch.no_grad()
def logits(model):
    """Of the token after QUESTION."""
    return model(torch.tensor([[FILLER, QUESTION]])).logits[0, -1]


def accuracy(model) -> float:
    """1 if the model answers, 0 if it doesn't."""
    return float(logits(model).argmax() == ANSWER)
