"""The scalar whose gradient makes an attribution: a function of each answer's log-probability, summed over samples."""

import torch
from torch import Tensor

TARGETS = ("probability", "log_probability", "mean_token_probability")


def target_sum(log_probs: Tensor, target: str, token_counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ_s T_s and the number of samples whose T_s underflowed to 0 (they give no gradient).

    With ℓ_s the log-probability of answer s and n_s its tokens: "probability" exp(ℓ_s) (eq. 1), "log_probability"
    ℓ_s, "mean_token_probability" exp(ℓ_s / n_s). log_probs: [B]; token_counts: [B], for the last. The sum is formed
    in fp32 (fp64 for fp64).
    """
    if log_probs.dtype != torch.float64:
        log_probs = log_probs.float()
    if target == "log_probability":
        return log_probs.sum(), torch.zeros((), dtype=torch.int64, device=log_probs.device)
    if target == "mean_token_probability":
        log_probs = log_probs / token_counts
    probabilities = log_probs.exp()
    return probabilities.sum(), (probabilities.detach() == 0).sum()


def check_log_probs(log_probs: Tensor, target: str, token_counts: Tensor | None) -> None:
    """Raises ValueError unless log_probs are [B ≥ 1] live numbers with the token counts the target needs.

    The numbers themselves are looked at on the CPU only: elsewhere looking would wait for the device. What is broken
    there makes attributions that aren't finite, which are left out, counted and raised as `nonfinite` says.
    """
    if log_probs.dim() != 1:
        raise ValueError(f"log_probs must be one number a sample, shape [B], got {list(log_probs.shape)}")
    if not log_probs.numel():
        raise ValueError("log_probs is empty: the forget set or this batch of it has no sample")
    if not log_probs.requires_grad:
        raise ValueError(
            "log_probs has no graph: form it with gradients enabled, from this model's logits. Where embeddings are "
            "frozen (LoRA), reentrant gradient checkpointing leaves none either: enable it with use_reentrant=False"
        )
    on_cpu = log_probs.device.type == "cpu"
    if on_cpu:
        wrong = (torch.isnan(log_probs) | (log_probs == float("inf"))).nonzero()
        if len(wrong):
            index = wrong[0].item()
            raise ValueError(
                f"log_probs[{index}] is {log_probs[index].item()}: the model's output is broken. Nothing was changed; "
                "lower the learning rate or go back to a sound checkpoint"
            )
    if target == "mean_token_probability":
        if token_counts is None:
            raise ValueError("target='mean_token_probability' needs token_counts: pass answer_token_counts(labels)")
        if token_counts.shape != log_probs.shape or (on_cpu and not (token_counts > 0).all()):
            raise ValueError(f"token_counts must be {len(log_probs)} numbers above 0, got {token_counts.tolist()}")


def reference_item(item: Tensor | tuple) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log_probs, token_counts, sample_ids) of an item that set_reference was given in one of its three forms."""
    if isinstance(item, Tensor):
        item = (item,)
    if not isinstance(item, tuple) or len(item) not in (1, 2, 3):
        raise TypeError(
            f"set_reference was given a {type(item).__name__}: an item is log_probs, (log_probs, token_counts) or "
            "(log_probs, token_counts or None, sample_ids)"
        )
    return (*item, None, None)[:3]
