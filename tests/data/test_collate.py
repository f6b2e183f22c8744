"""Label masks worked out by hand: what is prompt, what is answer, and which token ends it."""

import copy
import logging

import pytest
import torch

from ssiuu_fast.data.collate import Encoded, Encoder, collate, collate_prompts, length_sorted_batches
from ssiuu_fast.data.example import Example

ADA = Example("Who is Ada?", "a baker")


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _labelled(encoded):
    return [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]


def _check(encoder, example, prompt, answer):
    encoded = encoder.encode(example)
    assert encoded.input_ids == prompt + answer
    assert encoded.labels == [-100] * len(prompt) + answer
    assert encoder.encode_prompt(example) == prompt


def test_plain(tokenizer):
    prompt = [tokenizer.bos_token_id, *_ids(tokenizer, "Question: Who is Ada?\nAnswer:")]
    _check(Encoder(tokenizer), ADA, prompt, [*_ids(tokenizer, " a baker"), tokenizer.eos_token_id])


def test_plain_with_earlier_turns(tokenizer):
    example = Example("And Bo?", "a mason", turns=(("system", "Be brief."), ("user", "Ada?"), ("assistant", "a baker")))
    text = "Be brief.\n\nQuestion: Ada?\nAnswer: a baker\n\nQuestion: And Bo?\nAnswer:"
    prompt = [tokenizer.bos_token_id, *_ids(tokenizer, text)]
    _check(Encoder(tokenizer), example, prompt, [*_ids(tokenizer, " a mason"), tokenizer.eos_token_id])


@pytest.mark.parametrize("chat", [False, True])
def test_verbatim_takes_no_template_in_either_style(tokenizer, chat_tokenizer, chat):
    used = chat_tokenizer if chat else tokenizer
    example = Example("Ada is", " a baker", verbatim=True)
    prompt = [used.bos_token_id, *_ids(used, "Ada is")]
    _check(Encoder(used), example, prompt, [*_ids(used, " a baker"), used.eos_token_id])


def test_verbatim_keeps_the_prompt_of_generation_where_tokens_would_merge(tokenizer):
    whole, prompt, rest = (_ids(tokenizer, text) for text in ("Answer", "Ans", "wer"))
    assert whole != prompt + rest
    example = Example("Ans", "wer", verbatim=True)
    _check(Encoder(tokenizer), example, [tokenizer.bos_token_id, *prompt], [*rest, tokenizer.eos_token_id])


def test_chat_ends_with_its_end_of_turn_and_not_with_the_line_end_after_it(chat_tokenizer):
    encoder = Encoder(chat_tokenizer)
    assert encoder.style == "chat"
    prompt = _ids(chat_tokenizer, "<s><|user|>\nWho is Ada?<|end|>\n<|assistant|>\n")
    assert prompt.count(chat_tokenizer.bos_token_id) == 1
    _check(encoder, ADA, prompt, _ids(chat_tokenizer, "a baker<|end|>"))
    end = chat_tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoder.end_ids == sorted([end, chat_tokenizer.eos_token_id])
    # a bound too short for any row cuts answers, but doesn't change what ends one
    assert Encoder(chat_tokenizer, max_length=2).end_ids == encoder.end_ids


def test_chat_with_earlier_turns(chat_tokenizer):
    example = Example("And Bo?", "a mason", turns=(("system", "Be brief."), ("user", "Ada?"), ("assistant", "a baker")))
    text = (
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nAda?<|end|>\n<|assistant|>\na baker<|end|>\n"
        "<|user|>\nAnd Bo?<|end|>\n<|assistant|>\n"
    )
    _check(Encoder(chat_tokenizer), example, _ids(chat_tokenizer, text), _ids(chat_tokenizer, "a mason<|end|>"))


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    labelled = _labelled(Encoder(chat_tokenizer).encode(ADA))
    assert labelled == [*_ids(chat_tokenizer, " a baker\n"), chat_tokenizer.eos_token_id]


def test_the_date_of_a_template_is_pinned(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ date_string }}" + chat_tokenizer.chat_template
    prompt = Encoder(chat_tokenizer).encode_prompt(ADA)
    assert chat_tokenizer.decode(prompt).startswith("10 Apr 2025")


def test_a_template_that_does_not_continue_its_prompt_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% if add_generation_prompt %}<|user|>{% endif %}" + chat_tokenizer.chat_template
    with pytest.raises(ValueError, match="doesn't continue its own generation prompt.*style='plain'"):
        Encoder(chat_tokenizer).encode(ADA)


def test_question_and_answer_can_be_replaced(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.encode(ADA, answer="a poet", question="Ada?") == encoder.encode(Example("Ada?", "a poet"))
    assert encoder.encode_prompt(ADA, question="Ada?") == encoder.encode_prompt(Example("Ada?", "x"))


def test_rows_are_cut_at_the_end_counted_and_logged_once(tokenizer, caplog):
    prompt = Encoder(tokenizer).encode_prompt(ADA)
    encoder = Encoder(tokenizer, max_length=len(prompt) + 1)
    with caplog.at_level(logging.WARNING):
        assert _labelled(encoder.encode(ADA)) == _ids(tokenizer, " a baker")[:1]
        encoder.encode(ADA, answer="a mason")
    assert encoder.cut_rows == 2
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens leaves no room.*'Who is Ada"):
        Encoder(tokenizer, max_length=len(prompt)).encode(ADA)


def test_what_cannot_be_encoded_is_refused_at_once(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(tokenizer, style="chat")
    with pytest.raises(ValueError, match="style='fancy'"):
        Encoder(tokenizer, style="fancy")
    with pytest.raises(ValueError, match="max_length=1"):
        Encoder(tokenizer, max_length=1)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        Encoder(endless)


def test_padding_is_masked_by_length_even_where_pad_is_the_end_of_text(tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    encoder = Encoder(same)
    rows = [encoder.encode(ADA), encoder.encode(ADA, answer="a")]
    batch = collate(rows, encoder.pad_id)
    lengths = [len(row.input_ids) for row in rows]
    assert lengths[0] > lengths[1]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    last = lengths[1] - 1
    assert batch["input_ids"][1, last] == batch["labels"][1, last] == same.eos_token_id
    assert batch["attention_mask"][1, last] == 1
    assert batch["input_ids"][1, lengths[1] :].tolist() == [same.eos_token_id] * (lengths[0] - lengths[1])
    assert (batch["labels"][1, lengths[1] :] == -100).all()
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_pad_id_falls_back_to_the_end_of_text(tokenizer):
    padless = copy.deepcopy(tokenizer)
    assert Encoder(padless).pad_id == tokenizer.pad_token_id
    padless.pad_token = None
    assert Encoder(padless).pad_id == tokenizer.eos_token_id


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[5, 6, 7], [8]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batches_by_length_give_every_row_once():
    rows = [Encoded([1] * length, [-100] * length) for length in (2, 7, 3, 7, 1)]
    batches = list(length_sorted_batches(rows, 2))
    assert [indices for indices, _ in batches] == [[1, 3], [2, 0], [4]]
    for indices, batch in batches:
        assert batch["attention_mask"].sum(dim=1).tolist() == [len(rows[index].input_ids) for index in indices]
    assert [indices for indices, _ in length_sorted_batches(rows, 5, max_tokens=6)] == [[1], [3], [2, 0], [4]]
    with pytest.raises(ValueError, match="batch_size=0"):
        list(length_sorted_batches(rows, 0))
