import copy
import os
import warnings
from pathlib import Path

import pytest
import torch

from ssiuu_fast.data import people
from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.data.example import Example
from ssiuu_fast.data.tofu import load_split
from ssiuu_fast.evaluation import scores
from ssiuu_fast.evaluation.forwards import batch_log_probs, evaluating, log_probs_of_answers
from ssiuu_fast.models import new_llama, train_tokenizer

real_data = pytest.mark.skipif("SSIUU_TEST_DATA" not in os.environ, reason="SSIUU_TEST_DATA is not set")


@pytest.fixture(scope="module")
def known():
    """A tiny model that has learned five people's facts, its encoder, and these facts."""
    examples = people.generate(5).examples
    tokenizer = train_tokenizer([f"Question: {row.prompt}\nAnswer: {row.answer}" for row in examples], 500)
    encoder = Encoder(tokenizer)
    model = new_llama(tokenizer, hidden_size=64, layers=2, heads=2, max_positions=64)
    batch = collate([encoder.encode(row) for row in examples], encoder.pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, encoder, examples


def test_what_was_learned_is_scored_right_and_what_was_not_is_not(known):
    model, encoder, examples = known
    assert all(scores.option_log_prob_correct(model, encoder, examples))
    assert scores.generate_answers(model, encoder, examples, 16) == [row.answer for row in examples]
    swapped = [Example(row.prompt, row.false_options[0], (row.answer,)) for row in examples]
    assert not any(scores.option_log_prob_correct(model, encoder, swapped, batch_size=7))


def test_log_probs_are_those_of_one_row_alone(known):
    model, encoder, examples = known
    rows = [encoder.encode(row) for row in (examples[0], examples[7], examples[3])]
    batch = collate(rows, encoder.pad_id)
    with evaluating(model):
        together = batch_log_probs(model, batch)
        for row, value in zip(rows, together, strict=True):
            logits = model(torch.tensor([row.input_ids])).logits.log_softmax(dim=-1)[0]
            alone = sum(logits[place - 1, label] for place, label in enumerate(row.labels) if label != -100)
            torch.testing.assert_close(value, alone, atol=1e-4, rtol=1e-4)


def test_equal_log_probs_are_not_correct(known):
    model, encoder, examples = known
    row = examples[0]
    assert scores.option_log_prob_correct(model, encoder, [Example(row.prompt, row.answer, (row.answer,))]) == [False]


def test_left_padding_changes_no_answer_and_order_is_kept(known):
    model, encoder, examples = known
    # a model with large random weights answers differently as soon as a padded token is seen, a trained one may not
    rough = new_llama(
        encoder.tokenizer, hidden_size=64, layers=2, heads=2, max_positions=64, seed=5, initializer_range=0.3
    )
    rows = [examples[0], Example("a", "b", verbatim=True), *examples[1:8], Example("Which b", "b", verbatim=True)]
    lengths = [len(encoder.encode_prompt(row)) for row in rows]
    assert min(lengths) < max(lengths) / 3
    for used in (model, rough):
        alone = [scores.generate_answers(used, encoder, [row], 12)[0] for row in rows]
        assert len(set(alone)) > 5
        for batch_size in (4, len(rows)):
            assert scores.generate_answers(used, encoder, rows, 12, batch_size=batch_size) == alone


def test_generation_ignores_the_models_sampling_settings_and_puts_them_back(known):
    from transformers import GenerationConfig

    model, encoder, examples = known
    own = model.generation_config
    answers = [row.answer for row in examples[:4]]
    try:
        model.generation_config = GenerationConfig(do_sample=True, temperature=50.0, top_k=3, repetition_penalty=9.0)
        sampling = model.generation_config
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert scores.generate_answers(model, encoder, examples[:4], 16) == answers
        assert model.generation_config is sampling
        first = encoder.encode(examples[0]).input_ids[len(encoder.encode_prompt(examples[0]))]
        model.generation_config = GenerationConfig(eos_token_id=[first])
        assert len(scores.generate_answers(model, encoder, examples[:1], 16)[0]) < len(answers[0])
    finally:
        model.generation_config = own


def test_generation_stays_within_the_models_positions(known):
    _, encoder, examples = known
    prompt = len(encoder.encode_prompt(examples[0]))
    short = new_llama(encoder.tokenizer, hidden_size=16, layers=1, heads=2, max_positions=prompt + 2)
    scores.generate_answers(short, encoder, examples[:1], 200)
    full = new_llama(encoder.tokenizer, hidden_size=16, layers=1, heads=2, max_positions=prompt)
    with pytest.raises(ValueError, match=f"a prompt of {prompt} tokens fills the model's {prompt} positions"):
        scores.generate_answers(full, encoder, examples[:1], 200)


def test_adapters_are_scored_in_place_and_their_model_keeps_its_settings(known):
    from peft import LoraConfig, get_peft_model

    model, encoder, examples = known
    model = copy.deepcopy(model)
    own = model.generation_config
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False))
    asked = [(row, row.answer) for row in examples[:6]]
    found, _ = log_probs_of_answers(adapted, encoder, asked)
    answers = scores.generate_answers(adapted, encoder, examples[:6], 16)
    assert model.generation_config is own and adapted.generation_config is own
    merged = adapted.merge_and_unload()
    assert found == pytest.approx(log_probs_of_answers(merged, encoder, asked)[0], rel=1e-4)
    assert found != pytest.approx(log_probs_of_answers(known[0], encoder, asked)[0], rel=1e-2)
    assert answers == scores.generate_answers(merged, encoder, examples[:6], 16)


def test_a_sharded_wrapper_and_the_model_inside_keep_their_settings(known, tmp_path):
    """What FSDP2 shards is called from its root, here PEFT's wrapper, whose generate hands settings down."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import GenerationConfig

    model, encoder, examples = known
    inside = copy.deepcopy(model)
    inside.generation_config = own = GenerationConfig(do_sample=True, temperature=0.3, repetition_penalty=1.7)
    adapted = get_peft_model(inside, LoraConfig(target_modules=["q_proj"], r=2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = fully_shard(adapted)
        answers = scores.generate_answers(sharded, encoder, examples[:2], 16)
    finally:
        torch.distributed.destroy_process_group()
    assert answers == scores.generate_answers(model, encoder, examples[:2], 16)
    assert inside.generation_config is own and adapted.generation_config is own
    # nor does the wrapper shadow what is set later
    inside.generation_config = later = GenerationConfig()
    assert adapted.generation_config is later


def test_a_compiled_model_is_scored_without_its_graph(known):
    model, encoder, examples = known

    def refuse(*_):
        raise AssertionError("compiled")

    compiled = torch.compile(model, backend=refuse)
    assert scores.score(compiled, encoder, examples[:3]).values == [1.0] * 3
    assert scores.generate_answers(compiled, encoder, examples[:1], 16) == [examples[0].answer]


def test_every_modules_mode_is_put_back(known):
    model, encoder, examples = known
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    scores.score(model, encoder, examples[:2])
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_scores_of_a_mixed_file(known):
    model, encoder, examples = known
    free = Example(examples[0].prompt, examples[0].answer)
    wrong = Example(examples[1].prompt, "zzz")
    result = scores.score(model, encoder, [free, examples[2], wrong], max_new_tokens=16)
    assert result.values == [1.0, 1.0, 0.0]
    assert result.mean == pytest.approx(2 / 3)
    assert result.kind == "mixed"
    assert scores.score(model, encoder, examples[:3]).kind == "accuracy"
    assert scores.score(model, encoder, [free], max_new_tokens=8).kind == "rouge_l_recall"
    with pytest.raises(ValueError, match="the set to score is empty"):
        scores.score(model, encoder, [])


def test_multiple_choice_needs_options(known):
    model, encoder, examples = known
    with pytest.raises(ValueError, match=r"row 1 \('Who\?'\) has no false options"):
        scores.option_log_prob_correct(model, encoder, [examples[0], Example("Who?", "me")])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Rome", True),
        (" rome.\n", True),
        ("'ROME'", True),
        ("Rome, the capital", True),
        ("Rome or Oslo", False),
        ("Romeo", False),
        ("It is Rome", False),
        ("Oslo", False),
        ("Rome Falls", False),
        ("", False),
    ],
)
def test_what_counts_as_choosing_the_right_option(text, right):
    assert scores.chose_right(text, Example("Q", "Rome", ("Oslo", "Rome Falls"))) is right


def test_choosing_a_longer_option_that_holds_another():
    assert scores.chose_right("Rome Falls", Example("Q", "Rome Falls", ("Rome", "Oslo")))
    assert not scores.chose_right("Rome", Example("Q", "Rome Falls", ("Rome", "Oslo")))
    assert not scores.chose_right("-5", Example("Q", "5", ("-5", "7")))


def test_generated_choice_shows_every_option_in_a_stable_order(known, monkeypatch):
    model, encoder, examples = known
    asked = []

    def answer(model, encoder, prompts, *rest):
        asked.append(prompts)
        return [prompt.answer for prompt in prompts]

    monkeypatch.setattr(scores, "generate_answers", answer)
    for seed in (0, 0, 1):
        assert all(scores.option_generated_correct(model, encoder, examples, seed=seed))
    assert asked[0] == asked[1] != asked[2]
    row = Example("Who is Ada?", "a baker", ("a poet",))
    scores.option_generated_correct(model, encoder, [row])
    assert asked[3][0].prompt in {
        "Answer the following question by simply selecting a proper answer among the given options. You must generate "
        f"only the exact word without an explanation.\nQuestion: Who is Ada?\nOptions: {options}\nYour Answer:"
        for options in ("a baker, a poet", "a poet, a baker")
    }


def test_generated_choice_of_a_model(known):
    _, encoder, examples = known
    model = new_llama(encoder.tokenizer, hidden_size=16, layers=1, heads=2, max_positions=512)
    assert scores.option_generated_correct(model, encoder, examples[:3], max_new_tokens=4) == [False] * 3


def test_rouge_l_recall_by_hand():
    # the longest common subsequence of these has 3 of the reference's 4 words; the stemmer makes plays and played one
    assert scores.rouge_l_recall("Ada plays the big harp", "Ada played a harp") == 0.75
    assert scores.rouge_l_recall("", "Ada") == 0.0
    assert scores.rouge_l_recall("anything", "Ada") == 0.0


def test_thresholds_by_hand():
    three, four = Example("Q", "a", ("b", "c")), Example("Q", "a", ("b", "c", "d"))
    assert scores.default_threshold([three]) == 0.33
    assert scores.default_threshold([three, four]) == pytest.approx((0.33 + 0.25) / 2)
    # recall of the second by the first is 1 of 2 words, of the first by the second 1 of 1
    free = [Example("Q1", "red"), Example("Q2", "red fox")]
    assert scores.mismatched_threshold(free) == 0.75
    assert scores.default_threshold(free) == 0.75
    assert scores.default_threshold([*free, three]) == pytest.approx((2 * 0.75 + 0.33) / 3)
    with pytest.raises(ValueError, match="at least 2 rows, not 1: pass --threshold"):
        scores.mismatched_threshold(free[:1])


def test_a_sampled_threshold_is_near_the_exact_one():
    rows = [Example(f"Q{i}", f"word{i % 4} same") for i in range(40)]
    exact = scores.mismatched_threshold(rows)
    sampled = scores.mismatched_threshold(rows, seed=1, max_pairs=500)
    assert sampled != exact and sampled == pytest.approx(exact, abs=0.05)
    assert sampled == scores.mismatched_threshold(rows, seed=1, max_pairs=500)


@real_data
def test_mismatched_pairs_of_forget01():
    rows = load_split(Path(os.environ["SSIUU_TEST_DATA"], "tofu"), "forget01")
    assert scores.mismatched_threshold(rows) == pytest.approx(0.183, abs=5e-4)
