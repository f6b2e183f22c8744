"""Log-probs of the starting model: right, in row order, and never from a file that isn't theirs."""

import json
import logging

import pytest
import torch
import torch.distributed as dist
from plain_attribution import unpadded
from plain_objectives import encoded, nll_seq
from safetensors.torch import load_file, save_file
from tiny import batch, exactly, tiny_gpt2, tiny_llama
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.objectives import reference
from ssiuu_fast.objectives.reference import model_fingerprint, reference_log_probs

ROWS = batch(7, seed=1)


def cached(model, folder, rows=None, **options):
    """(log-probs, whether the model was asked)."""
    asked = []
    handle = model.register_forward_pre_hook(lambda module, inputs: asked.append(1))
    found = reference_log_probs(model, encoded(ROWS) if rows is None else rows, folder, **options)
    handle.remove()
    return found, bool(asked)


@pytest.mark.parametrize("make", [lambda: exactly(tiny_llama()), tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_values_in_row_order(make, batch_size):
    model = make()
    expected = torch.stack([-nll_seq(model, row)[0].detach() for row in unpadded(ROWS)])
    found = reference_log_probs(model, encoded(ROWS), None, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    assert model.training and not found.requires_grad


def test_dropout_is_off_and_modes_are_restored():
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    found = [reference_log_probs(model, encoded(ROWS), None) for _ in range(2)]
    assert torch.equal(*found)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_run_reads_the_same_bits(tmp_path, dtype):
    model = tiny_llama(dtype)
    folder = tmp_path / "new" / "folder"
    first, asked = cached(model, folder)
    assert asked and first.dtype == dtype
    # another copy, in another mode, under another name
    other = tiny_llama(dtype).eval()
    other.config._name_or_path = "elsewhere"
    second, asked = cached(other, folder, batch_size=2)
    assert not asked and second.dtype == dtype and torch.equal(first, second)
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]
    third, asked = cached(other, folder, fingerprint=model_fingerprint(model))
    assert not asked and torch.equal(first, third)


def test_another_model_another_file(tmp_path):
    model = tiny_llama(torch.float32)
    cached(model, tmp_path)
    with torch.no_grad():
        # the last bit of one weight
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(10.0))
    assert cached(model, tmp_path)[1]
    for change in (lambda model: model.bfloat16(), lambda model: setattr(model.config, "rms_norm_eps", 1e-3)):
        model = tiny_llama(torch.float32)
        change(model)
        assert cached(model, tmp_path)[1]
    assert not cached(tiny_llama(torch.float32), tmp_path)[1]


def test_other_rows_another_file(tmp_path):
    model = tiny_llama(torch.float32)
    rows = encoded(ROWS)
    cached(model, tmp_path, rows)
    shorter = Encoded(rows[0].input_ids[:-1], rows[0].labels[:-1])
    less_answer = Encoded(rows[0].input_ids, [-100, *rows[0].labels[1:-2], -100, rows[0].labels[-1]])
    for changed in ([shorter, *rows[1:]], [less_answer, *rows[1:]], rows[::-1], rows[:-1]):
        assert cached(model, tmp_path, changed)[1]
    assert not cached(model, tmp_path, rows)[1]


def test_autocast_is_another_dtype(tmp_path):
    model = tiny_llama(torch.float32)
    plain, _ = cached(model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        low, asked = cached(model, tmp_path)
        assert asked and not torch.equal(low, plain)
        assert not cached(model, tmp_path)[1]


def test_other_active_adapters_another_file(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(torch.float32), config)
    model.add_adapter("second", config)
    first, asked = cached(model, tmp_path)
    assert asked and not cached(model, tmp_path)[1]
    with model.disable_adapter():
        without, asked = cached(model, tmp_path)
    assert asked
    model.set_adapter("second")
    second, asked = cached(model, tmp_path)
    assert asked and torch.equal(second, reference_log_probs(model, encoded(ROWS), None))
    assert not torch.equal(first, second) and not torch.equal(first, without)


def sharded(**options):
    model = tiny_llama(torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, **options)
    return model


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_mixed_precision_of_fsdp_is_another_dtype(tmp_path, one_rank):
    plain, _ = cached(tiny_llama(torch.float32), tmp_path / "kept")
    assert not cached(sharded(), tmp_path / "kept")[1]
    low, asked = cached(sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), tmp_path / "kept")
    assert asked and not torch.equal(low, plain)


@pytest.mark.parametrize("folder", [None, "kept"])
def test_shards_are_back_after_the_reference(tmp_path, one_rank, folder):
    """Also where FSDP2 keeps whole weights after a forward pass, and whether or not there is one."""
    for _ in range(2):
        model = sharded(reshard_after_forward=False)
        reference_log_probs(model, encoded(ROWS), folder and tmp_path / folder)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        SSIUURegularizer(model)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-3])


def empty(file):
    file.write_bytes(b"")


def no_safetensors(file):
    file.write_text("PK not this")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def of_other_rows(file):
    """Sound in itself, but the content of another name."""
    other = tiny_llama(torch.float32, seed=1)
    reference_log_probs(other, encoded(ROWS), file.parent)
    (theirs,) = (path for path in file.parent.iterdir() if path != file)
    theirs.replace(file)


def without_metadata(file):
    tensors = load_file(str(file))
    save_file(tensors, str(file))


def of_another_tensor(file):
    save_file({"something": torch.zeros(7)}, str(file))


@pytest.mark.parametrize(
    "damage",
    [truncated, empty, no_safetensors, flipped, of_other_rows, without_metadata, of_another_tensor],
)
def test_a_damaged_file_is_computed_anew(tmp_path, damage, caplog):
    model = tiny_llama(torch.float32)
    first, _ = cached(model, tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    with caplog.at_level(logging.WARNING):
        again, asked = cached(model, tmp_path)
    assert asked and torch.equal(first, again)
    assert "computed anew" in caplog.text
    assert not cached(model, tmp_path)[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_llama(torch.float32)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(reference.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        cached(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_model_is_not_kept(tmp_path):
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives row 0 the log-probability nan, and 7 of 7 rows such"):
        cached(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_no_rows():
    assert reference_log_probs(tiny_llama(torch.float32), [], None).shape == (0,)


def test_fingerprint_reads_every_byte(monkeypatch):
    """In chunks of any size, and of weights that aren't contiguous."""
    whole = model_fingerprint(tiny_gpt2(torch.bfloat16))
    monkeypatch.setattr(reference, "_CHUNK", 7)
    assert model_fingerprint(tiny_gpt2(torch.bfloat16)) == whole
    model = tiny_gpt2(torch.bfloat16)
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.data = weight.data.T.contiguous().T
    assert model_fingerprint(model) == whole
    with torch.no_grad():
        weight[0, 0] += 1
    assert model_fingerprint(model) != whole


def test_adapters_count_with_their_scale():
    peft = pytest.importorskip("peft")

    def adapted(alpha):
        torch.manual_seed(0)
        return peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(target_modules=["up_proj", "down_proj"], r=2, lora_alpha=alpha)
        )

    assert model_fingerprint(adapted(4)) == model_fingerprint(adapted(4)) != model_fingerprint(adapted(8))


def test_what_is_in_the_file(tmp_path):
    from safetensors import safe_open

    found, _ = cached(tiny_llama(torch.float32), tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(str(file), framework="pt") as opened:
        assert list(opened.keys()) == ["log_probs"]
        assert torch.equal(opened.get_tensor("log_probs"), found)
        metadata = opened.metadata()
    assert metadata["format"] == "ssiuu_fast.reference_log_probs 1"
    assert file.name == f"reference-{metadata['key']}.safetensors"
    assert json.dumps(metadata)
