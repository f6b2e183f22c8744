"""Adapters put on models, written and read as folders, merged, and in the commands."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from taught import small_task
from tiny import batch, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast import attribute, models
from ssiuu_fast.adapters import add_lora, is_adapted, merged
from ssiuu_fast.cli import main
from ssiuu_fast.unlearn_options import UnlearnOptions
from ssiuu_fast.unlearning import unlearn

peft = pytest.importorskip("peft")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model):
    rows = batch()
    with torch.inference_mode():
        return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits


def shaken(model):
    """B away from 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = models.train_tokenizer(["Who is Ada? a baker"], 300)
    models.save(tiny_llama(torch.float32, vocab_size=300), tokenizer, folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """(folder of an adapter of base, the logits of the two together)."""
    model, tokenizer = models.load(base)
    model = shaken(add_lora(model, rank=2))
    models.save(model, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter", logits(model.eval())


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# putting them on


def adapted_modules(model):
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_lora_is_on_every_linear_module_of_the_blocks_and_changes_nothing_at_first():
    model = tiny_llama()
    before = logits(model.eval())
    model = add_lora(model, rank=3)
    assert sorted(name.rpartition(".")[2] for name in adapted_modules(model)) == sorted(2 * EVERY)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(model), before)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2 and layer.lora_A["default"].weight.shape == (3, 16)
    conv = add_lora(tiny_gpt2(), rank=2)
    assert len(adapted_modules(conv)) == 8 and not any("lm_head" in name for name in adapted_modules(conv))


def test_targets_are_ends_of_names():
    chosen = adapted_modules(add_lora(tiny_llama(), rank=2, alpha=5, targets=["q_proj", "layers.1.mlp.down_proj"]))
    assert {name.removeprefix("base_model.model.model.layers.") for name in chosen} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ["q_proj", "q_prj", "embed_tokens"],
            "no linear module is named q_prj, embed_tokens; this model has q_proj, k_",
        ),
        (["proj"], "no linear module is named proj;"),
        ([], "nothing given"),
        ("q_proj", r"write \['q_proj'\]"),
    ],
)
def test_targets_that_match_nothing_are_named_with_what_there_is(targets, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank=2, targets=targets)
    assert all(p.requires_grad for p in model.parameters()) and not adapted_modules(model)


def test_adapters_on_adapters_are_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(tiny_llama(), rank=2), rank=2)


def test_adapters_of_16_bit_models_are_in_32():
    model = add_lora(tiny_llama(torch.bfloat16), rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# folders


def test_a_model_and_an_adapter_in_one_folder_are_refused(adapter, base, tmp_path):
    folder, _ = adapter
    adapted, tokenizer = models.load(folder)
    plain, _ = models.load(base)
    with pytest.raises(ValueError, match="adapter holds an adapter, and a model can't be saved beside it"):
        models.save(plain, tokenizer, folder)
    both = tmp_path / "both"
    shutil.copytree(base, both)
    with pytest.raises(ValueError, match="both holds a model, and an adapter can't be saved beside it"):
        models.save(adapted, tokenizer, both)
    assert not (folder / "config.json").exists() and not (both / "adapter_config.json").exists()
    # each over its own kind
    models.save(adapted, tokenizer, folder)
    models.save(plain, tokenizer, both)
    shutil.copytree(folder, both, dirs_exist_ok=True)
    for read in (models.load, models.load_tokenizer, models.base_name):
        with pytest.raises(ValueError, match=r"both holds both a model \(config.json\) and an adapter"):
            read(both)


def test_out_of_memory_is_not_taken_for_another_base(adapter, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory$"):
        models.load(adapter[0])


def test_an_adapter_folder_holds_the_adapter_alone_and_is_read_on_its_base(adapter, base):
    folder, expected = adapter
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 28 and all(".lora_" in name for name in saved)
    assert not (folder / "config.json").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model, tokenizer = models.load(folder)
    assert is_adapted(model) and not model.training
    assert torch.equal(logits(model), expected)
    assert tokenizer("Who is Ada?")["input_ids"] == models.load_tokenizer(base)("Who is Ada?")["input_ids"]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert models.base_name(folder) == str(base) and models.base_name(base) == str(base)


def test_a_relative_base_is_found_from_elsewhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    model, tokenizer = models.load("model")
    models.save(add_lora(model, rank=2), tokenizer, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert is_adapted(models.load("adapter")[0])


def test_an_adapter_without_tokenizer_takes_that_of_its_base(adapter, base):
    folder, _ = adapter
    for file in folder.glob("*token*"):
        file.unlink()
    assert models.load(folder)[1].get_vocab() == models.load_tokenizer(base).get_vocab()


def test_an_adapter_beside_a_whole_model_is_the_model(adapter, base, tmp_path):
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(adapter[0] / "adapter_model.safetensors", tmp_path / "both")
    assert not is_adapted(models.load(tmp_path / "both")[0])


def test_an_adapter_of_the_hub_is_fetched_without_anything_else(adapter, monkeypatch):
    import huggingface_hub
    from transformers import utils

    folder, expected = adapter
    asked = []
    monkeypatch.setattr(utils, "find_adapter_config_file", lambda name: name == "nobody/adapter" or None)

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert torch.equal(logits(models.load("nobody/adapter")[0]), expected)
    for name, patterns in asked:
        assert name == "nobody/adapter"
        assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in patterns)


def no_weights(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def half(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[::2]), folder / "adapter_model.safetensors")


def of_another_model(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros(7, 7) for name in tensors}, folder / "adapter_model.safetensors")


BASE, OTHER = "base_model_name_or_path", "can't be put on its base model"
SPOILT = {
    "no base": (
        lambda folder: edit(folder, **{BASE: "/nowhere/model"}),
        f"adapter of /nowhere/model, which can't be loaded: .*no such model folder.*{BASE}",
    ),
    "none named": (lambda folder: edit(folder, **{BASE: None}), "names no base model"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "names no base model"),
    "its own base": (lambda folder: edit(folder, **{BASE: str(folder)}), "is an adapter itself"),
    "prompt": (
        lambda folder: edit(folder, peft_type="PROMPT_TUNING", num_virtual_tokens=4),
        "PROMPT_TUNING adapter, w",
    ),
    "unknown kind": (lambda folder: edit(folder, peft_type="NEW"), OTHER),
    "no target": (lambda folder: edit(folder, target_modules=["nothing"]), OTHER),
    "pickled": (no_weights, r"without adapter_model.safetensors \(pickled weights"),
    "half": (half, f"{OTHER}.*missing adapter keys"),
    "other shapes": (of_another_model, f"{OTHER}, is it of another one"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT.keys())
def test_folders_that_are_no_whole_adapter_are_refused(adapter, spoil, message):
    folder, _ = adapter
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        models.load(folder)
    assert len(str(refused.value).splitlines()) == 1


# merging


def test_merged_is_the_same_model_all_of_it_trainable(adapter):
    folder, expected = adapter
    model = merged(models.load(folder)[0])
    assert not is_adapted(model) and all(p.requires_grad for p in model.parameters())
    assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = tiny_llama()
    assert merged(plain) is plain


def test_what_cannot_be_merged_is_refused():
    model = add_lora(tiny_llama(), rank=2)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj.*is quantised"):
        merged(model)


def test_attributions_are_those_of_the_merged_model(adapter):
    folder, _ = adapter
    model, whole = models.load(folder)[0].double(), merged(models.load(folder)[0].double())
    one, other = attribute(model, [batch()]), attribute(whole, [batch()])
    assert one.max.keys() == other.max.keys() and len(one.max) == 14
    for site in one.max:
        scale = other.max[site].abs().max()
        assert (one.max[site] - other.max[site]).abs().max() < 1e-4 * scale
        assert (one.min[site] - other.min[site]).abs().max() < 1e-4 * scale
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


# the loop and the commands


def test_a_loop_that_would_train_nothing_is_refused(taught):
    model, encoder = taught
    model = add_lora(model, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    rows, asked = small_task().split.forget, []
    with pytest.raises(ValueError, match="may train nothing: use .*'use_reentrant': False"):
        unlearn(
            model, encoder, rows, None, objective="ga", learning_rate=1e-3, threshold=0.1, forget_score=asked.append
        )
    assert not asked


def test_the_weights_of_the_lowest_score_are_given_back_to_adapters(taught):
    model, encoder = taught
    model = add_lora(model, rank=2)
    rows, seen = small_task().split.forget, []
    scores = iter([0.9, 0.5, 0.7])

    def score(model):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next(scores)

    terms = {"objective": "ga", "learning_rate": 1e-3, "threshold": 0.1, "max_epochs": 2}
    unlearn(model, encoder, rows, None, forget_score=score, **terms)
    assert all(torch.equal(p, seen[1][name]) for name, p in model.named_parameters())
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in seen[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be a number above 0"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "lora_dropout must be at least 0 and under 1, got 1.0"),
        ({"lora_alpha": 2.0}, "give lora_rank too"),
        ({"lora_targets": ["q_proj"]}, "give lora_rank too"),
        ({"lora_dropout": 0.1}, "give lora_rank too"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearnOptions("model", "forget", **options)


def rows_file(path, examples):
    rows = [{"question": e.prompt, "answer": e.answer, "options": list(e.false_options)} for e in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_adapters_through_every_command(taught_folder, tmp_path, capsys):
    split = small_task().split
    forget = rows_file(tmp_path / "forget.jsonl", split.forget)
    retain = rows_file(tmp_path / "retain.jsonl", split.retain)
    rows = ["--forget", forget, "--retain", retain]

    def run(command, name, *flags):
        assert main([command, *map(str, flags), "--output", str(tmp_path / name)]) == 0
        return capsys.readouterr().out

    lora = ["--lora_rank", "4", "--gradient_checkpointing", "true", "--learning_rate", "2e-2", "--max_epochs", "4"]
    lora += ["--lora_targets", "[q_proj,down_proj]", "--weight", "1"]
    run("unlearn", "unlearned", "--model", taught_folder, *rows, *lora)
    model = tmp_path / "unlearned" / "model"
    results = json.loads((tmp_path / "unlearned" / "results.json").read_text())
    assert results["after"]["FS"] < results["before"]["FS"]
    tensors = load_file(model / "adapter_model.safetensors")
    # every B moved away from 0, where it began
    assert len(tensors) == 8 and all(tensor.any() for tensor in tensors.values())

    run("evaluate", "scored", "--model", model, "--data", forget)
    assert json.loads((tmp_path / "scored" / "results.json").read_text())["mean"] == results["after"]["FS"]

    attack = ["--harmful", "[0.3]", "--instructions", "none", "--seeds", "1", "--only_wrong", "false"]
    said = run("attack", "attacked", "--model", model, "--forget", forget, *attack, "--taught_at", "5e-3")
    assert "is an adapter: merged into its model in memory" in said
    attacked = json.loads((tmp_path / "attacked" / "results.json").read_text())[0]
    assert attacked["recovered"] > attacked["before"]

    further = ["--threshold", "0", "--max_epochs", "2", "--learning_rate", "2e-2", "--weight", "1"]
    run("unlearn", "further", "--model", model, *rows, *further)
    again = load_file(tmp_path / "further" / "model" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and not all(torch.equal(again[name], tensors[name]) for name in again)

    few = rows_file(tmp_path / "few.jsonl", split.forget[:4])
    said = run("influence", "looked", "--before", taught_folder, "--after", model, "--data", few)
    assert "D−" in said
    assert main(["unlearn", "--model", str(model), *rows, "--lora_rank", "4", "--output", str(tmp_path / "no")]) == 1
    assert "has adapters already" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_what_quantised_weights_need_is_said(taught_folder, tmp_path, capsys, monkeypatch):
    forget = rows_file(tmp_path / "forget.jsonl", small_task().split.forget)
    flags = ["unlearn", "--model", str(taught_folder), "--forget", forget, "--load_in_4bit", "true"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 1
    assert "weights in 4 bits can't be trained, give lora_rank too" in capsys.readouterr().err
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert main([*flags, "--lora_rank", "2", "--output", str(tmp_path / "run")]) == 1
    assert "pip install bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
