"""Tiny models and batches that the tests share."""

import torch


def tiny_llama(dtype=torch.float64, seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    # larger initial weights than usual: probabilities that differ enough for the penalty to be seen
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config), initializer_range=0.3)).to(dtype)
    return model.train()


def tiny_gpt2(dtype=torch.float64, seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=48,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).to(dtype).train()


def tiny_mixtral(dtype=torch.float32, seed=0):
    """Its experts are two 3-D parameters a block, as transformers 5 fuses them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).to(dtype).train()


def batch(samples=5, seed=0, length=9, vocabulary=48):
    """Right-padded rows of different lengths; the last 2 to 3 real tokens are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (samples, length), generator=generator)
    lengths = torch.randint(5, length + 1, (samples,), generator=generator)
    answers = torch.randint(2, 4, (samples,), generator=generator)
    places = torch.arange(length)
    mask = places < lengths[:, None]
    labels = ids.masked_fill(~mask | (places < (lengths - answers)[:, None]), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def part(batch, start, stop):
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def log_probs_of(model, rows):
    from ssiuu_fast import sequence_log_probs

    return sequence_log_probs(
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits, rows["labels"]
    )


def tiny_model(architecture, dtype=torch.float64, seed=0, **config):
    """A tiny causal model of an architecture that transformers knows ("qwen2"), heads of size 8."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(architecture, **(sizes | config))
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def exactly(model):
    """The model with norms in its own dtype: those of Llama and its kin compute in fp32 whatever they are given."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = ExactRMSNorm
    return model


class ExactRMSNorm(torch.nn.Module):
    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
