"""One batch as attribution reads it: checked, with the tokens that count and the target of each sample."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ssiuu_fast.ops import answer_token_counts, sequence_log_probs
from ssiuu_fast.targets import TARGETS as _PROBABILITIES
from ssiuu_fast.targets import target_sum

# labels outside the answer
IGNORE = -100
LOGIT_DIFFERENCE = "logit_difference"
TARGETS = (*_PROBABILITIES, LOGIT_DIFFERENCE)
POSITIONS = ("all", "prompt", "answer", "no_bos")


class AttributionBatch:
    """input_ids, attention_mask and labels of B samples, [B, T] each, and distractors [B] for logit_difference.

    Raises ValueError for what is missing or doesn't fit, before a model sees it. first: number of samples before
    these, so that an error names a sample by its place in the data.
    """

    def __init__(self, batch: Mapping[str, Tensor], *, target: str, positions: str, first: int = 0):
        self.target = target
        self._first = first
        self._check_shapes(batch)
        self.input_ids = batch["input_ids"]
        self.attended = batch["attention_mask"] != 0
        self.labels = batch["labels"]
        self.distractors = batch["distractors"] if target == LOGIT_DIFFERENCE else None
        self._refuse((answer_token_counts(self.labels) == 0), "has no answer token to score (a label after the first)")
        self._refuse(((self.labels != IGNORE) & ~self.attended).any(1), "has a label on a token that is not attended")
        self.counted = self._counted(positions)
        self._refuse(~self.counted.any(1), f"has no token that counts under positions={positions!r}")
        if self.distractors is not None:
            gold = self._gold()[1]
            same = gold == self.distractors.to(gold.device)
            self._refuse(same, "has a distractor equal to its answer's first token: leave it out")

    def __len__(self) -> int:
        return len(self.labels)

    def add_to_hash(self, digest) -> None:
        """What defines each sample, in order: the same for any split into batches and any padding."""
        for row in range(len(self)):
            parts = [tensor[row][self.attended[row]] for tensor in (self.input_ids, self.labels)]
            if self.distractors is not None:
                parts.append(self.distractors[row : row + 1])
            for part in parts:
                numbers = part.to("cpu", torch.int64).contiguous()
                digest.update(len(numbers).to_bytes(8, "little"))
                digest.update(bytes(numbers.view(torch.uint8).tolist()))

    def position_ids(self) -> Tensor | None:
        """Where each token stands in its sample; None where a model counts so by itself, without left padding."""
        if self.attended[:, 0].all():
            return None
        return (self.attended.long().cumsum(1) - 1).clamp(min=0)

    def logits_to_keep(self) -> int:
        """How many last positions hold all logits that the target needs."""
        answers = (self.labels[:, 1:] != IGNORE).any(0)
        return self.labels.shape[1] - int(answers.nonzero()[0])

    def scores(self, logits: Tensor) -> Tensor:
        """[B] with a graph, fp32 or fp64: log P(y|x) or, for logit_difference, gold − distractor.

        logits: [B, K, V], those of the last K positions.
        """
        kept = logits.shape[1]
        if self.target != LOGIT_DIFFERENCE:
            return sequence_log_probs(logits, self.labels[:, -kept:].to(logits.device))
        rows = torch.arange(len(self), device=logits.device)
        places, gold = (tensor.to(logits.device) for tensor in self._gold())
        # position t − 1 speaks about token t
        at_answer = logits[rows, places - 1 - (self.labels.shape[1] - kept)]
        chosen = at_answer[rows, gold] - at_answer[rows, self.distractors.to(logits.device)]
        return chosen if chosen.dtype == torch.float64 else chosen.float()

    def weights(self, scores: Tensor) -> tuple[Tensor, int]:
        """∂T_s/∂score_s ≥ 0 of each sample, [B] without a graph, and how many T_s underflowed to 0."""
        if self.target == LOGIT_DIFFERENCE:
            return torch.ones_like(scores), 0
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            total, underflows = target_sum(leaf, self.target, answer_token_counts(self.labels).to(leaf.device))
            (weights,) = torch.autograd.grad(total, leaf)
        return weights, int(underflows)

    def _gold(self) -> tuple[Tensor, Tensor]:
        """Place and token of the first answer token of each sample."""
        answers = self.labels != IGNORE
        answers[:, 0] = False
        places = answers.int().argmax(1)
        return places, self.labels.gather(1, places[:, None]).squeeze(1)

    def _counted(self, positions: str) -> Tensor:
        if positions == "prompt":
            return self.attended & (self.labels == IGNORE)
        if positions == "answer":
            return self.labels != IGNORE
        if positions == "no_bos":
            return self.attended & (self.attended.cumsum(1) > 1)
        return self.attended

    def _check_shapes(self, batch: Mapping[str, Tensor]) -> None:
        needed = ["input_ids", "attention_mask", "labels"]
        if self.target == LOGIT_DIFFERENCE:
            needed.append("distractors")
        for name in needed:
            if name not in batch:
                why = ", one token id a sample for target='logit_difference'" if name == "distractors" else ""
                raise ValueError(f"a batch has no {name!r}{why} (it has {', '.join(map(repr, batch))})")
        shape = batch["input_ids"].shape
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"input_ids must be [samples, tokens], got {list(shape)}")
        for name in needed[1:]:
            expected = shape[:1] if name == "distractors" else shape
            if batch[name].shape != expected:
                raise ValueError(f"{name} must be {list(expected)}, got {list(batch[name].shape)}")

    def _refuse(self, wrong: Tensor, why: str) -> None:
        if wrong.any():
            raise ValueError(f"sample {self._first + int(wrong.nonzero()[0])} {why}")


def new_hash():
    return hashlib.sha256()
