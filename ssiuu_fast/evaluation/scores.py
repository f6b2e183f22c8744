"""What a model knows: multiple choice by log-prob and by generation, and ROUGE-L recall of greedy answers.

Every function puts the model into eval mode and back, runs without gradients on the model's own device, and returns
results in the order of its input.
"""

import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example, require_rows
from ssiuu_fast.evaluation.forwards import log_probs_of_answers
from ssiuu_fast.evaluation.generation import generate_answers

CHOICE_TEMPLATE = (
    "Answer the following question by simply selecting a proper answer among the given options. "
    "You must generate only the exact word without an explanation.\n"
    "Question: {question}\nOptions: {options}\nYour Answer:"
)
_WRAPPING = " .,;:!?\"'`*()[]{}\u2018\u2019\u201c\u201d"


@dataclass(frozen=True)
class Scores:
    """A score in 0...1 for each row. kind: "accuracy", "rouge_l_recall", or "mixed" where a file has rows of both."""

    values: list[float]
    kind: str

    @property
    def mean(self) -> float:
        """The set's score: the mean over rows."""
        return sum(self.values) / len(self.values)


def score(
    model,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int = 64,
    max_new_tokens: int = 200,
    progress: bool = False,
) -> Scores:
    """Rows with false options by log-prob multiple choice (0 or 1), others by ROUGE-L recall of the greedy answer."""
    require_rows(examples, "the set to score")
    choice = [index for index, example in enumerate(examples) if example.false_options]
    free = [index for index, example in enumerate(examples) if not example.false_options]
    values = [0.0] * len(examples)
    correct = option_log_prob_correct(model, encoder, [examples[index] for index in choice], batch_size, progress)
    for index, right in zip(choice, correct, strict=True):
        values[index] = float(right)
    answers = generate_answers(
        model, encoder, [examples[index] for index in free], max_new_tokens, batch_size, progress
    )
    for index, answer in zip(free, answers, strict=True):
        values[index] = rouge_l_recall(answer, examples[index].answer)
    return Scores(values, "mixed" if choice and free else "accuracy" if choice else "rouge_l_recall")


def default_threshold(examples: Sequence[Example], seed: int = 0) -> float:
    """The score of a model that doesn't know these rows: where unlearning stops.

    Mean over rows of chance, 100/k percent rounded down for k options (0.33 for three, as in the paper), and of the
    mismatched pairs' ROUGE-L recall for rows without options.
    """
    require_rows(examples, "the set to take a threshold from")
    free = [example for example in examples if not example.false_options]
    # fsum: a hundred rows of 0.33 make 0.33, and 33 right of them are at the threshold
    total = math.fsum(
        math.floor(100 / (1 + len(example.false_options))) / 100 for example in examples if example.false_options
    )
    if free:
        total += len(free) * mismatched_threshold(free, seed)
    return total / len(examples)


def option_log_prob_correct(
    model, encoder: Encoder, examples: Sequence[Example], batch_size: int = 64, progress: bool = False
) -> list[bool]:
    """Whether the right answer has a strictly higher log P(answer | question) than every false option.

    The log-prob is the sum over the answer's tokens, its end token included, with no normalisation by length.
    batch_size counts sequences, one for each option. Raises ValueError for a row without false options,
    FloatingPointError for a model whose log-probs aren't numbers.
    """
    _require_options(examples)
    asked = [(example, answer) for example in examples for answer in (example.answer, *example.false_options)]
    log_probs, _ = log_probs_of_answers(model, encoder, asked, batch_size, progress)
    correct, start = [], 0
    for example in examples:
        gold, *others = log_probs[start : start + 1 + len(example.false_options)]
        correct.append(all(gold > other for other in others))
        start += 1 + len(others)
    return correct


def option_generated_correct(
    model,
    encoder: Encoder,
    examples: Sequence[Example],
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> list[bool]:
    """Whether the model, shown the options, writes the right one (`CHOICE_TEMPLATE`, greedy).

    Options are shuffled by (seed, row). Texts are compared after normalising: Unicode NFKC, lower case, single spaces,
    no punctuation at the ends. Right means: of the options the text starts with, as whole words, the longest is the
    right one, and none of the others occurs, as whole words, after it.
    """
    _require_options(examples)
    prompts = [_choice_example(example, seed, index, encoder.style) for index, example in enumerate(examples)]
    texts = generate_answers(model, encoder, prompts, max_new_tokens, batch_size, progress)
    return [chose_right(text, example) for text, example in zip(texts, examples, strict=True)]


def chose_right(generated: str, example: Example) -> bool:
    """The rule of `option_generated_correct` for one generated text."""
    text, gold = _normalised(generated), _normalised(example.answer)
    others = [_normalised(option) for option in example.false_options]
    leading = [option for option in (gold, *others) if _starts(text, option)]
    if not leading or max(leading, key=len) != gold:
        return False
    return not any(_contains(text[len(gold) :], option) for option in others)


def rouge_l_recall(prediction: str, reference: str) -> float:
    """Recall of ROUGE-L (`rouge_score`, stemmed): share of the reference's words in the longest common subsequence."""
    return _rouge().score(reference, prediction)["rougeL"].recall


def mismatched_threshold(examples: Sequence[Example], seed: int = 0, max_pairs: int = 4000) -> float:
    """Mean ROUGE-L recall of answers scored against the answers to other questions of the same file.

    What a fluent model scores that has forgotten which answer belongs where (the paper's threshold is one such
    mispairing). Exact over all ordered pairs of different rows while there are no more than `max_pairs`, else over that
    many drawn by `seed`. Raises ValueError for a file of a single row.
    """
    count = len(examples)
    if count < 2:
        raise ValueError(f"a threshold from mismatched pairs needs at least 2 rows, not {count}: pass --threshold")
    if count * (count - 1) <= max_pairs:
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    else:
        draw = random.Random(seed)
        pairs = [(i, (i + draw.randrange(1, count)) % count) for i in (draw.randrange(count) for _ in range(max_pairs))]
    return sum(rouge_l_recall(examples[i].answer, examples[j].answer) for i, j in pairs) / len(pairs)


def _require_options(examples: Sequence[Example]) -> None:
    for index, example in enumerate(examples):
        if not example.false_options:
            raise ValueError(
                f"row {index} ({example.prompt[:80]!r}) has no false options: multiple choice needs at least one"
            )


def _choice_example(example: Example, seed: int, index: int, style: str) -> Example:
    options = [example.answer, *example.false_options]
    random.Random(f"{seed}:{index}").shuffle(options)
    prompt = CHOICE_TEMPLATE.format(question=example.prompt, options=", ".join(options))
    # the template ends with its own "Your Answer:", so plain style adds nothing around it
    return Example(prompt, example.answer, verbatim=style == "plain")


def _normalised(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # signs stay: "-5" is not "5", nor "C++" "C"; an option of punctuation alone stays as it is
    return text.strip(_WRAPPING) or text


def _starts(text: str, option: str) -> bool:
    return text.startswith(option) and not text[len(option) : len(option) + 1].isalnum()


def _contains(text: str, option: str) -> bool:
    place = text.find(option)
    while place >= 0:
        if not text[max(place - 1, 0) : place].isalnum() and _starts(text[place:], option):
            return True
        place = text.find(option, place + 1)
    return False


@lru_cache(maxsize=1)
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
