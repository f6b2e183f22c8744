"""From examples to token ids with label masks, and from these to padded batches."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ssiuu_fast.data.example import Example

logger = logging.getLogger(__name__)
IGNORE = -100
PLAIN_PROMPT = "Question: {}\nAnswer:"
STYLES = ("auto", "chat", "plain")
# chat templates that print today's date would otherwise give other tokens every day
DATE_STRING = "10 Apr 2025"
_CACHED_ROWS = 200_000


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; labels are the same ids on the answer and its end token, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def asked_with(question: Encoded, answer: Encoded, max_length: int) -> Encoded:
    """The prompt of one row with the answer of another, cut to max_length tokens like any row.

    The prompt is what stands before the first label, the answer all from there on.
    """
    prompt = question.input_ids[: _first_label(question)]
    place = _first_label(answer)
    ids = (prompt + answer.input_ids[place:])[:max_length]
    return Encoded(ids, ([IGNORE] * len(prompt) + answer.labels[place:])[:max_length])


class Encoder:
    """Turns examples into token ids, the same way for training, scoring and generation.

    style "chat": the tokenizer's chat template, with its date pinned; "plain": "Question: {prompt}\\nAnswer:"
    followed by " {answer}" and the end-of-text token; "auto": chat where the tokenizer has a template. Verbatim
    examples take no template in either style. The tokenizer's own BOS is there exactly once. An answer ends with the
    token that tells a model to stop (end of text, or the template's end of turn), labelled like the rest of it.

    Rows longer than `max_length` tokens are cut at the end and counted (`cut_rows`); a row whose prompt leaves no room
    for the answer raises ValueError.
    """

    def __init__(self, tokenizer, style: str = "auto", max_length: int = 512):
        if style not in STYLES:
            raise ValueError(f"style={style!r}: must be one of {', '.join(STYLES)}")
        if style == "chat" and not tokenizer.chat_template:
            raise ValueError("style='chat', but the tokenizer has no chat template: use style='plain'")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token; set tokenizer.eos_token, or a model can't learn to stop"
            )
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: must be at least 2, a token of prompt and one of answer")
        self.tokenizer = tokenizer
        self.style = ("chat" if tokenizer.chat_template else "plain") if style == "auto" else style
        self.max_length = max_length
        self.cut_rows = 0
        self._beginning = _added_beginning(tokenizer)
        self._cache: dict[tuple, Encoded | list[int]] = {}

    @property
    def pad_id(self) -> int:
        """What fills the padding: the pad token, else end of text. Masks go by length, so the two may be equal."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @cached_property
    def end_ids(self) -> list[int]:
        """The token ids that end an answer in this style."""
        ends = {self.tokenizer.eos_token_id}
        if self.style == "chat":
            probe = Example("a", "b")
            ends.add(self._chat_answer(probe, probe.answer, self._chat_prompt(probe))[-1])
        return sorted(ends)

    def encode(self, example: Example, answer: str | None = None, question: str | None = None) -> Encoded:
        """Ids and labels of an example; `answer` and `question` replace its own. Treat the result as read-only."""
        key = (example, answer, question)
        if key not in self._cache:
            self._remember(key, self._encode(*self._texts(example, answer, question)))
        return self._cache[key]

    def encode_prompt(self, example: Example, question: str | None = None) -> list[int]:
        """The ids to generate an answer from: exactly those before the answer in `encode`."""
        key = (example, question)
        if key not in self._cache:
            row, _ = self._texts(example, None, question)
            self._remember(key, self._prompt(row))
        return self._cache[key]

    def _texts(self, example: Example, answer: str | None, question: str | None) -> tuple[Example, str]:
        if question is not None:
            example = Example(question, example.answer, turns=example.turns, verbatim=example.verbatim)
        return example, example.answer if answer is None else answer

    def _remember(self, key: tuple, value) -> None:
        # evaluation encodes the same rows hundreds of times
        if len(self._cache) >= _CACHED_ROWS:
            self._cache.clear()
        self._cache[key] = value

    def _encode(self, example: Example, answer: str) -> Encoded:
        prompt = self._prompt(example)
        ids = (
            self._chat_answer(example, answer, prompt)
            if self._is_chat(example)
            else self._text_answer(example, answer, prompt)
        )
        kept = (prompt + ids)[: self.max_length]
        if len(prompt) + len(ids) > self.max_length:
            self._count_cut(len(prompt) + len(ids))
        return Encoded(kept, [IGNORE] * len(prompt) + kept[len(prompt) :])

    def _prompt(self, example: Example) -> list[int]:
        if self._is_chat(example):
            ids = self._chat_prompt(example)
        else:
            ids = self._tokens(self._prompt_text(example), beginning=True)
        if len(ids) >= self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer within max_length={self.max_length}: "
                f"{example.prompt[:80]!r}; raise max_length or shorten the prompt"
            )
        return ids

    def _is_chat(self, example: Example) -> bool:
        return self.style == "chat" and not example.verbatim

    def _template(self, messages: list[dict], **options) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, date_string=DATE_STRING, **options
        )

    def _chat_prompt(self, example: Example) -> list[int]:
        return self._template(_messages(example), add_generation_prompt=True)

    def _chat_answer(self, example: Example, answer: str, prompt: list[int]) -> list[int]:
        whole = self._template([*_messages(example), {"role": "assistant", "content": answer}])
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                "this tokenizer's chat template doesn't continue its own generation prompt with the answer, so the "
                f"answer's tokens can't be told from the prompt's ({example.prompt[:80]!r}): use style='plain' or "
                "another template"
            )
        ids = whole[len(prompt) :]
        ends = [place for place, token in enumerate(ids) if token in self._special_ids]
        if not ends:
            return [*ids, self.tokenizer.eos_token_id]
        # a template may put a line end after its end of turn; a model has stopped by then
        after = self.tokenizer.decode(ids[ends[-1] + 1 :])
        return ids[: ends[-1] + 1] if not after.strip() else [*ids, self.tokenizer.eos_token_id]

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)

    def _prompt_text(self, example: Example) -> str:
        if example.verbatim:
            return example.prompt
        forms = {"system": "{}\n\n", "user": PLAIN_PROMPT, "assistant": " {}\n\n"}
        return "".join(forms[role].format(text) for role, text in [*example.turns, ("user", example.prompt)])

    def _text_answer(self, example: Example, answer: str, prompt: list[int]) -> list[int]:
        answer = answer if example.verbatim else f" {answer}"
        whole = self._tokens(self._prompt_text(example) + answer, beginning=True)
        # tokenised together where that keeps the prompt's ids (some tokenizers add a space to the start of any text)
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._tokens(answer)
        return [*ids, self.tokenizer.eos_token_id]

    def _tokens(self, text: str, beginning: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if beginning and ids[: len(self._beginning)] != self._beginning:
            ids = self._beginning + ids
        return ids

    def _count_cut(self, length: int) -> None:
        self.cut_rows += 1
        if self.cut_rows == 1:
            logger.warning(
                "a row of %d tokens was cut to max_length=%d; further cuts are counted in Encoder.cut_rows",
                length,
                self.max_length,
            )


def collate(rows: Sequence[Encoded], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded int64 batch: input_ids, attention_mask (by length, not by id) and labels (-100 on padding)."""
    length = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for place, row in enumerate(rows):
        ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[place, : len(row.input_ids)] = 1
        labels[place, : len(row.labels)] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collate_prompts(prompts: Sequence[list[int]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded int64 batch for generation: input_ids and attention_mask, by length."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, length - len(prompt) :] = torch.tensor(prompt)
        mask[place, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def length_sorted_batches(
    rows: Sequence[Encoded], batch_size: int, max_tokens: int | None = None, pad_id: int = 0
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(indices into `rows`, batch) over all rows, longest first, so that little is spent on padding.

    For work whose order doesn't matter. max_tokens bounds rows x longest row of a batch; a row longer than that is a
    batch of its own. Longest first: what doesn't fit into memory fails at once.
    """
    for indices in length_sorted_indices([len(row.input_ids) for row in rows], batch_size, max_tokens):
        yield indices, collate([rows[index] for index in indices], pad_id)


def length_sorted_indices(
    lengths: Sequence[int], batch_size: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Index lists of `length_sorted_batches`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        fitting = batch_size if max_tokens is None else max(1, max_tokens // lengths[order[start]])
        stop = start + min(batch_size, fitting)
        yield order[start:stop]
        start = stop


def _first_label(row: Encoded) -> int:
    return next((place for place, label in enumerate(row.labels) if label != IGNORE), len(row.labels))


def _added_beginning(tokenizer) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place]
    return []


def _messages(example: Example) -> list[dict]:
    return [{"role": role, "content": text} for role, text in [*example.turns, ("user", example.prompt)]]
