"""Scores in two processes, each with a part of the rows, are those of one process."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation import memorisation, scores
from ssiuu_fast.models import new_llama, train_tokenizer

RANKS = 2
ROWS = [
    Example("Who is Ada, who lives next to Bo?", "a baker", ("a poet", "a cook of soup")),
    Example("Where is Bo?", "in Rome", ("in Paris",)),
    Example("Is it late, or is it early?", "yes, it is"),
    Example("What does Cy play on a rainy day?", "the flute"),
    Example("Why?", "for fun", perturbed_answers=("no reason", "money")),
]
BATCH_SIZES = (1, 64)
WRAPPERS = ("ddp", "fsdp2", "ddp_lora", "fsdp2_lora")


def _encoder():
    tokenizer = train_tokenizer([f"{row.prompt} {row.answer}" for row in ROWS], 300)
    return Encoder(tokenizer, max_length=64)


def _model(encoder, lora=False, tied=True):
    """Knows three of the rows, so that some answers end soon and others go on."""
    model = new_llama(
        encoder.tokenizer,
        hidden_size=32,
        layers=2,
        heads=2,
        max_positions=48,
        initializer_range=0.2,
        tie_embeddings=tied,
    ).double()
    known = collate([encoder.encode(row) for row in ROWS[:3]], encoder.pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**known).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False))
    return model


def _wrapped(model, wrapper):
    if wrapper.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    if wrapper.startswith("fsdp2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for module in list(model.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _scored(model, encoder, batch_size):
    return {
        "mixed": scores.score(model, encoder, ROWS, batch_size, max_new_tokens=12).values,
        "answers": scores.generate_answers(model, encoder, ROWS, 12, batch_size),
        "all positions": scores.generate_answers(model, encoder, ROWS[2:3] * 3, 200, batch_size),
        "one row": scores.generate_answers(model, encoder, ROWS[:1], 4, batch_size),
        "predicted": memorisation.predicted_tokens(model, encoder, ROWS, batch_size),
        "losses": [losses.answer for losses in memorisation.answer_losses(model, encoder, ROWS, batch_size)],
        "truth ratio": memorisation.truth_ratios(model, encoder, ROWS[-1:], batch_size),
        "no rows": scores.generate_answers(model, encoder, [], 4, batch_size),
    }


def _trained(model, encoder, evaluate):
    """Losses of three steps, with an evaluation before each."""
    batch = collate([encoder.encode(row) for row in ROWS], encoder.pad_id)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        if evaluate:
            memorisation.answer_losses(model, encoder, ROWS)
            scores.generate_answers(model, encoder, ROWS, 3)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _raised(work):
    try:
        work()
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _errors(encoder, wrapper):
    """What a broken embedding of a token that only one row has makes of scores, and a prompt without room."""
    model = _model(encoder, tied=False)
    token = encoder.encode(ROWS[3]).input_ids[-2]
    assert not any(token in encoder.encode(row).input_ids for row in ROWS[:3])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model = _wrapped(model, wrapper)
    return {
        "one row": _raised(lambda: memorisation.answer_losses(model, encoder, ROWS, 1)),
        "its tokens": _raised(lambda: memorisation.predicted_tokens(model, encoder, ROWS, 1)),
        "others": _raised(lambda: memorisation.answer_losses(model, encoder, ROWS[:3], 1)),
        "no room": _raised(lambda: scores.generate_answers(model, encoder, [Example("a b c d e f g h " * 3, "x")])),
    }


def _rank(rank, folder):
    torch.set_num_threads(1)
    # ranks that lose each other fail, rather than wait
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=patience)
    encoder = _encoder()
    found = {}
    for wrapper in WRAPPERS:
        model = _model(encoder, lora="lora" in wrapper)
        wrapped = _wrapped(model, wrapper)
        found[wrapper] = {str(batch_size): _scored(wrapped, encoder, batch_size) for batch_size in BATCH_SIZES}
        if "lora" not in wrapper:
            found[wrapper]["trained"] = _trained(wrapped, encoder, evaluate=True)
            found[wrapper]["errors"] = _errors(encoder, wrapper)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, args=(str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def in_one_process():
    encoder = _encoder()
    return {
        lora: {str(batch_size): _scored(_model(encoder, lora), encoder, batch_size) for batch_size in BATCH_SIZES}
        for lora in (False, True)
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_rank_has_what_one_process_has(in_two_processes, in_one_process, wrapper):
    alone = in_one_process["lora" in wrapper]
    assert len(set(alone["1"]["answers"])) == len(ROWS)
    assert 0 < sum(alone["1"]["mixed"]) < len(ROWS)
    for found in in_two_processes:
        # rows one by one: the same numbers. In larger batches two ranks cut them elsewhere, and padding rounds
        assert found[wrapper]["1"] == alone["1"]
        for name, values in found[wrapper]["64"].items():
            expected = alone["64"][name]
            assert values == (pytest.approx(expected, rel=1e-12) if name in ("losses", "truth ratio") else expected), (
                name
            )


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_training_goes_on_as_if_nobody_had_looked(in_two_processes, wrapper):
    encoder = _encoder()
    alone = _trained(_model(encoder), encoder, evaluate=False)
    for found in in_two_processes:
        assert found[wrapper]["trained"] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_all_ranks_raise_together(in_two_processes, wrapper):
    for found in in_two_processes:
        errors = found[wrapper]["errors"]
        assert errors["one row"].startswith("FloatingPointError: the model's outputs are not numbers")
        assert errors["its tokens"] == errors["one row"]
        assert errors["others"] is None
        assert "fills the model's 48 positions" in errors["no room"]
