"""A case of benchmarks/step.py: model, rows and optimizer, the same for every contestant."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

SHORT, LONG = 2, 64
# rows of a step come from these in turn: attributions then differ from those of the step before, as in training.
# No multiple of 4, so that the steps of every=4 see them all
BATCHES = 3


def llama(hidden, layers, heads, ffn, vocabulary=8192, key_value_heads=None, tied=True) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads or heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SIZES = {
    "tiny": llama(32, 2, 2, 64, vocabulary=64),
    "25m": llama(512, 6, 8, 1408),
    "50m": llama(640, 9, 10, 1728),
    "100m": llama(768, 14, 12, 2048),
    "200m": llama(1024, 15, 16, 2816),
    "400m": llama(1280, 20, 20, 3456),
    # the shapes of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B
    "1b": llama(2048, 16, 32, 8192, vocabulary=128256, key_value_heads=8),
    "3b": llama(3072, 28, 24, 8192, vocabulary=128256, key_value_heads=8),
    "8b": llama(4096, 32, 32, 14336, vocabulary=128256, key_value_heads=8, tied=False),
    # as many tensors as 3b in which nothing is left but calls: what a step costs the host
    "calls": llama(32, 28, 2, 64, vocabulary=64),
    # as many parameters in the blocks each (51.4 M), in more and thinner layers
    "51m/28": llama(1024, 4, 16, 2816),
    "51m/112": llama(512, 16, 8, 1408),
    "51m/448": llama(256, 64, 4, 704),
}


@dataclass(frozen=True)
class Case:
    """Forget rows = retain rows = batch, each of `length` tokens without padding, the last `answer_tokens` its answer.

    regime: "noskip", where every forget row is to take part in the penalty, or "skip", where none is.
    """

    size: str
    dtype: str = "float32"
    batch: int = 4
    length: int = 128
    micro_batches: int = 1
    answer_tokens: int = SHORT
    target: str = "probability"
    regime: str = "noskip"
    device: str = "cpu"
    threads: int = 1
    layers: int | None = None  # instead of the size's own

    def __post_init__(self):
        if self.batch % self.micro_batches:
            raise ValueError(f"batch={self.batch} rows don't divide into micro_batches={self.micro_batches}")
        if not 0 < self.answer_tokens < self.length:
            raise ValueError(f"answer_tokens={self.answer_tokens} must leave a prompt in length={self.length}")

    @property
    def name(self) -> str:
        layers = f" {self.layers} layers" if self.layers else ""
        micro = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return (
            f"{self.size}{layers} {self.dtype}, {self.batch} + {self.batch} rows{micro} x {self.length}, "
            f"answers of {self.answer_tokens}, {self.target}, {self.regime}"
        )

    @property
    def tokens(self) -> int:
        """Of a step, forget and retain."""
        return 2 * self.batch * self.length

    def as_dict(self) -> dict:
        return asdict(self)


def build_model(case: Case, device) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SIZES[case.size] | ({"num_hidden_layers": case.layers} if case.layers else {})
    config = LlamaConfig(**shape, max_position_embeddings=case.length, use_cache=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).train()


def twin_of(model: nn.Module, case: Case) -> nn.Module:
    """Other modules over the same parameters: what a contestant hooks into its model doesn't slow the base."""
    twin = build_model(case, "meta")
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        other._parameters = module._parameters
        other._buffers = module._buffers
        if hasattr(module, "original_inv_freq"):
            other.original_inv_freq = module.original_inv_freq
    return twin


def rows_of(case: Case, seed: int, device) -> dict[str, Tensor]:
    vocabulary = SIZES[case.size]["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (case.batch, case.length), generator=generator)
    labels = ids.clone()
    labels[:, : case.length - case.answer_tokens] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def micro_batches(rows: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    parts = {name: tensor.chunk(count) for name, tensor in rows.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


class Setup:
    """What the steps of one process work on.

    The learning rate is 0: AdamW does all of its arithmetic and moves nothing, so that P is the same in every round.
    """

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.device = torch.device(case.device)
        self.model = build_model(case, self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        self.batches = [
            (rows_of(case, 2 * number, self.device), rows_of(case, 2 * number + 1, self.device))
            for number in range(BATCHES)
        ]
        # of a step, forget or retain
        self.answer_tokens = case.batch * case.answer_tokens

    def counts(self) -> dict[str, int]:
        from ssiuu_fast.selection import select_parameters

        regularized = select_parameters(self.model, None)
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "regularized_parameters": sum(parameter.numel() for parameter in regularized.values()),
            "tensors": len(regularized),
            "tokens": self.case.tokens,
        }

    def targets(self) -> list[float]:
        """T_s of every forget row, as the penalty sees it (METHOD: P(y|x), or what stands for it)."""
        from ssiuu_fast import answer_token_counts, sequence_log_probs

        values = []
        with torch.no_grad():
            for forget, _ in self.batches:
                for rows in micro_batches(forget, self.case.micro_batches):
                    log_probs = sequence_log_probs(self.model(input_ids=rows["input_ids"]).logits, rows["labels"])
                    if self.case.target == "mean_token_probability":
                        log_probs = log_probs / answer_token_counts(rows["labels"])
                    # the weight of a row of log P is 1, however small P is
                    one = self.case.target == "log_probability"
                    values += [1.0] * len(log_probs) if one else log_probs.exp().tolist()
        return values

    def sight(self) -> dict:
        """Which rows the road of one backward pass would leave out, by their T alone."""
        from ssiuu_fast.shared_backward import NEGLIGIBLE

        targets, least = self.targets(), NEGLIGIBLE
        return {
            "rows": len(targets),
            "rows_skipped": sum(value < least for value in targets),
            "smallest_target": min(targets),
            "tolerance": least,
        }
