import math

import pytest
import torch
from tiny import batch, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation.logit_lens import Decoder, final_norm, lens_batches, logit_lens
from ssiuu_fast.models import train_tokenizer

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def tiny_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)).double()


def tiny_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).double()


def tiny_phi():
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES)).double()
    # the head of this one has a bias
    nn.init.normal_(model.lm_head.bias)
    return model


def tiny_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    # a cap low enough to bend these logits
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    # transformers' attention of this one gives NaN in float64 where a whole row is padding
    return Gemma2ForCausalLM(config).float()


def exactness(model):
    return 1e-6 if model.dtype == torch.float32 else 1e-10


MODELS = [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_neox, tiny_phi, tiny_gemma2]


def rows_with_distractors(samples=5):
    """Rows whose distractor is the token after the gold one; and their gold tokens and answer places."""
    rows = batch(samples=samples)
    places = (rows["labels"] != -100).int().argmax(dim=1)
    gold = rows["labels"][torch.arange(samples), places]
    return rows | {"distractors": (gold + 1) % 48}, gold, places


def padded_left(rows):
    """The same rows with their padding before them."""
    shifts = (rows["attention_mask"] == 0).sum(dim=1).tolist()
    turned = {
        name: torch.stack([row.roll(shift) for row, shift in zip(rows[name], shifts, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    return rows | turned


@pytest.mark.parametrize("build", MODELS)
def test_the_last_layer_is_the_models_own_probabilities(build):
    model = build().eval()
    rows, gold, places = rows_with_distractors()
    lens = logit_lens(model, [rows], Decoder(model))
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    probabilities = logits[torch.arange(5), places - 1].softmax(dim=-1)
    right, wrong = (probabilities.gather(1, tokens[:, None])[:, 0] for tokens in (gold, rows["distractors"]))
    assert lens.means[-1] == pytest.approx(float((right / (right + wrong)).mean()), abs=exactness(model))
    assert abs(lens.means[-1] - 0.5) > 1e-3
    assert (len(lens.means), lens.pairs, lens.left_out) == (2, 5, 0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_layers_before_it_go_through_the_norm_once(build):
    model = build().eval()
    rows, gold, places = rows_with_distractors()
    with torch.no_grad():
        states = model(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], output_hidden_states=True
        ).hidden_states
        body = model.model if hasattr(model, "model") else model.transformer
        normed = (body.norm if hasattr(body, "norm") else body.ln_f)(states[1])
        shares = []
        for row in range(5):
            logits = model.lm_head(normed[row, places[row] - 1])
            odds = math.exp(logits[rows["distractors"][row]] - logits[gold[row]])
            shares.append(1 / (1 + odds))
    assert logit_lens(model, [rows], Decoder(model)).means[0] == pytest.approx(sum(shares) / 5, abs=1e-12)


@pytest.mark.parametrize("build", MODELS)
def test_padding_on_the_left_and_batches_of_one_change_nothing(build):
    model = build()
    rows, _, _ = rows_with_distractors()
    decoder = Decoder(model)
    right = logit_lens(model, [rows], decoder).means
    assert logit_lens(model, [padded_left(rows)], decoder).means == pytest.approx(right, abs=exactness(model))
    alone = [{name: tensor[place : place + 1] for name, tensor in rows.items()} for place in range(5)]
    assert logit_lens(model, alone, decoder).means == pytest.approx(right, abs=exactness(model))


def test_the_decoder_stays_that_of_the_original_model():
    model = tiny_llama()
    rows, _, _ = rows_with_distractors()
    decoder = Decoder(model)
    plain = logit_lens(model, [rows], decoder).means
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        model.model.norm.weight.copy_(torch.linspace(-2, 2, 16))
    # the hidden states are as they were, and nothing else of the model is looked at
    assert logit_lens(model, [rows], decoder).means == plain
    assert logit_lens(model, [rows], Decoder(model)).means != plain


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_original_may_be_in_another_dtype(build, before, after):
    model = build().eval()
    rows, _, _ = rows_with_distractors()
    exact = logit_lens(model, [rows], Decoder(model)).means
    decoder = Decoder(model.to(before))
    assert logit_lens(model.to(after), [rows], decoder).means == pytest.approx(exact, abs=0.03)


def test_modes_and_hooks_are_as_they_were():
    model = tiny_llama()
    rows, _, _ = rows_with_distractors()
    logit_lens(model, [rows], Decoder(model))
    assert model.training and not model.model.norm._forward_pre_hooks
    with pytest.raises(RuntimeError):
        logit_lens(model, [rows | {"attention_mask": rows["attention_mask"][:, :2]}], Decoder(model))
    assert model.training and not model.model.norm._forward_pre_hooks


def test_pairs_that_begin_alike_are_left_out_and_counted():
    model = tiny_llama()
    rows, gold, _ = rows_with_distractors()
    some = rows | {"distractors": torch.where(torch.arange(5) < 2, gold, rows["distractors"])}
    lens = logit_lens(model, [some], Decoder(model))
    others = {name: tensor[2:] for name, tensor in rows.items()}
    assert lens.means == pytest.approx(logit_lens(model, [others], Decoder(model)).means, abs=1e-12)
    assert (lens.pairs, lens.left_out) == (3, 2)
    with pytest.raises(ValueError, match="in all 5 samples"):
        logit_lens(model, [rows | {"distractors": gold}], Decoder(model))


def test_samples_without_an_answer_are_refused():
    model = tiny_llama()
    rows, _, _ = rows_with_distractors()
    for labels in (torch.full_like(rows["labels"], -100), rows["input_ids"]):
        with pytest.raises(ValueError, match="no answer, or nothing before it"):
            logit_lens(model, [rows | {"labels": labels}], Decoder(model))


def test_models_that_cannot_be_read_are_refused():
    model = tiny_llama()
    model.model.norm, norm = None, model.model.norm
    with pytest.raises(ValueError, match="LlamaForCausalLM: no final norm was found"):
        Decoder(model)
    model.model.last_norm = norm
    with pytest.raises(ValueError, match="has none of norm, ln_f"):
        final_norm(model)
    model = tiny_llama()
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="scales its logits \\(logits_scaling\\)"):
        Decoder(model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="this one is Sequential"):
        Decoder(model)


def test_broken_weights_give_no_number():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    rows, _, _ = rows_with_distractors()
    with pytest.raises(FloatingPointError, match="not numbers"):
        logit_lens(model, [rows], Decoder(tiny_llama()))


def examples(count=6, options=True):
    words = ["red", "blue", "green", "white", "black", "grey", "pink", "brown"]
    return [
        Example(f"Which colour is {'very ' * place}{place}?", words[place], tuple(words[6:]) if options else ())
        for place in range(count)
    ]


def an_encoder():
    texts = [
        f"Question: {row.prompt}\nAnswer: {word}" for row in examples() for word in (row.answer, *row.false_options)
    ]
    # large enough for every word to be one token
    return Encoder(train_tokenizer(texts, 400))


def drawn(encoder, rows, seed=0, batch_size=2):
    """Question → first token of its distractor."""
    found = {}
    for part in lens_batches(encoder, rows, seed, batch_size):
        for ids, token in zip(part["input_ids"].tolist(), part["distractors"].tolist(), strict=True):
            ends = next(row for row in rows if ids[: len(encoder.encode_prompt(row))] == encoder.encode_prompt(row))
            found[ends.prompt] = token
    return found


def test_distractors_are_false_options_drawn_by_seed_and_row():
    encoder, rows = an_encoder(), examples()
    first = {
        answer: next(label for label in encoder.encode(rows[0], answer=answer).labels if label != -100)
        for answer in ("pink", "brown", *(row.answer for row in rows))
    }
    found = drawn(encoder, rows)
    assert len(found) == 6 and set(found.values()) == {first["pink"], first["brown"]}
    assert first["pink"] != first["brown"]
    assert drawn(encoder, rows, batch_size=5) == found
    # the first rows of a longer set draw what they drew
    assert drawn(encoder, rows[:3]) == {row.prompt: found[row.prompt] for row in rows[:3]}


def test_without_options_the_distractor_is_another_rows_answer():
    encoder, rows = an_encoder(), examples(options=False)
    seen = set()
    for seed in range(20):
        for part in lens_batches(encoder, rows, seed, 4):
            labels = part["labels"]
            gold = labels.gather(1, (labels != -100).int().argmax(dim=1, keepdim=True))[:, 0]
            seen |= set((gold == part["distractors"]).tolist())
    # no row is its own distractor
    assert seen == {False}
    with pytest.raises(ValueError, match="a single row without false options"):
        list(lens_batches(encoder, rows[:1]))


def test_batches_are_those_of_the_rows():
    encoder, rows = an_encoder(), examples(2)
    (made,) = lens_batches(encoder, rows, batch_size=4)
    longest_first = collate(sorted(map(encoder.encode, rows), key=lambda row: -len(row.input_ids)), encoder.pad_id)
    assert all(torch.equal(made[name], longest_first[name]) for name in longest_first)
