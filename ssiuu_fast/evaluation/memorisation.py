"""How much of an answer a model has by heart: probability, truth ratio, exact memorisation, extraction strength."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssiuu_fast.data.collate import IGNORE, Encoder, collate
from ssiuu_fast.data.example import Example, require_rows
from ssiuu_fast.evaluation import tofu_metrics
from ssiuu_fast.evaluation.forwards import (
    answer_logits,
    evaluating,
    forward_module,
    log_probs_of_answers,
    over_ranks,
    progress_bar,
    require_numbers,
)


@dataclass(frozen=True)
class Losses:
    """Mean NLL per answer token, in nats, for one row.

    answer: of its own answer; paraphrased: of the answer in other words, None without one; perturbed: of the perturbed
    answers.
    """

    answer: float
    paraphrased: float | None
    perturbed: tuple[float, ...]

    @property
    def probability(self) -> float:
        return tofu_metrics.probability(self.answer)

    @property
    def normalised_probability(self) -> float:
        """Of the answer among itself and its perturbed answers."""
        wrong = [tofu_metrics.probability(loss) for loss in self.perturbed]
        return tofu_metrics.normalised_probability(self.probability, wrong)

    @property
    def truth_ratio(self) -> float:
        right = self.answer if self.paraphrased is None else self.paraphrased
        return tofu_metrics.geometric_truth_ratio(right, self.perturbed)


def answer_losses(
    model, encoder: Encoder, examples: Sequence[Example], batch_size: int = 64, progress: bool = False
) -> list[Losses]:
    """The losses of each row's answers. batch_size counts sequences, one for each answer.

    Raises FloatingPointError for a model whose log-probs aren't numbers.
    """
    answers = [_answers(example) for example in examples]
    asked = [(example, answer) for example, texts in zip(examples, answers, strict=True) for answer in texts]
    log_probs, tokens = log_probs_of_answers(model, encoder, asked, batch_size, progress)
    losses = [-log_prob / count for log_prob, count in zip(log_probs, tokens, strict=True)]
    found, start = [], 0
    for example, texts in zip(examples, answers, strict=True):
        own, *rest = losses[start : start + len(texts)]
        paraphrased = rest.pop(0) if example.paraphrased_answer is not None else None
        found.append(Losses(own, paraphrased, tuple(rest)))
        start += len(texts)
    return found


def truth_ratios(
    model, encoder: Encoder, examples: Sequence[Example], batch_size: int = 64, progress: bool = False
) -> list[float]:
    """`tofu_metrics.geometric_truth_ratio` of each row. Raises ValueError for a row without perturbed answers."""
    require_perturbed(examples)
    return [losses.truth_ratio for losses in answer_losses(model, encoder, examples, batch_size, progress)]


def require_perturbed(examples: Sequence[Example]) -> None:
    for index, example in enumerate(examples):
        if not example.perturbed_answers:
            raise ValueError(
                f"row {index} ({example.prompt[:80]!r}) has no perturbed answers: a truth ratio needs them, as TOFU's "
                "*_perturbed splits have"
            )


def predicted_tokens(
    model, encoder: Encoder, examples: Sequence[Example], batch_size: int = 64, progress: bool = False
) -> list[list[bool]]:
    """For each answer's tokens, whether the model's likeliest token is the right one, given all before it.

    The end token is left out. Raises FloatingPointError for a model whose outputs aren't numbers.
    """
    require_rows(examples, "the set to score")
    model = forward_module(model)
    rows = [encoder.encode(example) for example in examples]

    def work(own: list[int], _) -> list[list[bool] | None]:
        logits, labels = answer_logits(model, collate([rows[row] for row in own], encoder.pad_id))
        return _predicted(logits, labels, set(encoder.end_ids))

    lengths = [len(row.input_ids) for row in rows]
    with evaluating(model), progress_bar(progress, len(rows), "answers") as bar:
        predicted = over_ranks(model, lengths, batch_size, work, bar)
    require_numbers(None not in predicted)
    return predicted


def exact_memorisation(predicted: Sequence[bool]) -> float:
    """Share of an answer's tokens that are predicted (`predicted_tokens`); 0 for an answer of the end token alone."""
    return sum(predicted) / len(predicted) if predicted else 0.0


def extraction_strength(predicted: Sequence[bool]) -> float:
    """1 − k/n: k of the answer's n tokens must be given for the model to write the rest (arXiv 2406.09179).

    The rest is written greedily, so that k counts up to the last token that isn't predicted (`predicted_tokens`). k is
    at most n − 1, as in OpenUnlearning's code, whose figures this is compared with: a model that needs all tokens has
    1/n, not 0. 0 for an answer of the end token alone.
    """
    written = 0
    while written < len(predicted) and predicted[-1 - written]:
        written += 1
    return max(written, 1) / len(predicted) if predicted else 0.0


def _answers(example: Example) -> list[str]:
    paraphrased = [] if example.paraphrased_answer is None else [example.paraphrased_answer]
    return [example.answer, *paraphrased, *example.perturbed_answers]


def _predicted(logits: Tensor, labels: Tensor, ends: set[int]) -> list[list[bool] | None]:
    """Row by row; None for a row whose logits aren't numbers."""
    highest, tokens = (found.cpu() for found in logits[:, :-1].max(dim=-1))
    labels = labels[:, 1:].cpu()
    rows = []
    for scores, chosen, wanted in zip(highest, tokens, labels, strict=True):
        answer = (wanted != IGNORE).nonzero()[:, 0]
        finite = bool(scores[answer].isfinite().all())
        # an answer that was cut at the length limit has no end token
        if len(answer) and int(wanted[answer[-1]]) in ends:
            answer = answer[:-1]
        rows.append((chosen[answer] == wanted[answer]).tolist() if finite else None)
    return rows
