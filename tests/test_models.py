import json

import pytest
import torch

from ssiuu_fast.models import load, new_llama, save, train_tokenizer

TEXTS = ["Question: Who is Ada?\nAnswer: a baker", "Where is Bo? in Rome", "naïve café 北京"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture()
def model(tokenizer):
    return new_llama(tokenizer, hidden_size=16, layers=2, heads=2, max_positions=64, seed=3)


def test_tokenizer_is_deterministic_and_gives_any_text_back(tokenizer):
    assert tokenizer.get_vocab() == train_tokenizer(TEXTS, 300).get_vocab()
    for text in (*TEXTS, " two  spaces\n\n", "unseen: 🜁"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("Ada")["input_ids"][0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=100: must be at least 259"):
        train_tokenizer(TEXTS, 100)


def test_a_new_model_depends_on_its_seed_alone(tokenizer, model):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = new_llama(tokenizer, hidden_size=16, layers=2, heads=2, max_positions=64, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = new_llama(tokenizer, hidden_size=16, layers=2, heads=2, max_positions=64, seed=4)
    weights = [dict(made.named_parameters())["model.layers.1.mlp.up_proj.weight"] for made in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = new_llama(tokenizer, hidden_size=16, layers=1, heads=2, tie_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tokenizer):
    with pytest.raises(ValueError, match="hidden_size=16 must be a multiple of heads=3"):
        new_llama(tokenizer, hidden_size=16, heads=3)


def test_saved_folder_is_read_by_load_and_by_transformers(tmp_path, tokenizer, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(model, tokenizer, tmp_path / "model")
    ids = tokenizer("Question: Who is Ada?", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model(ids).logits
        for loaded, words in (
            load(tmp_path / "model"),
            (
                AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
                AutoTokenizer.from_pretrained(tmp_path / "model"),
            ),
        ):
            assert torch.equal(loaded(ids).logits, expected)
            assert not loaded.training
            for text in (*TEXTS, " two  spaces\n\n"):
                assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
                assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == text
            assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
            )
    assert load(tmp_path / "model", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json.*found: nothing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"no \*\.safetensors weights"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "config.json")


def test_a_folder_without_a_tokenizer_is_named_with_the_remedy(tmp_path, model):
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises((ValueError, OSError), match=r"can't load .*bare.*tokenizer\.save_pretrained") as refused:
        load(tmp_path / "bare")
    assert len(str(refused.value).splitlines()) == 1


def test_a_name_that_is_neither_folder_nor_hub_says_both(monkeypatch):
    import transformers

    def refuse(*arguments, **options):
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"load nobody/nothing \(no such local folder, and by hub name\): no conn"):
        load("nobody/nothing")
