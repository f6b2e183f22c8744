"""State saved by two ranks or one goes on, on two ranks or one, as if nothing had happened."""

import copy
import json

import pytest
import torch
from rank_runs import Case, Run, rows_of
from steps import WEIGHT
from tiny import log_probs_of, tiny_llama

from ssiuu_fast import SSIUURegularizer, load_regularizer, save_regularizer

UNEVEN = {"intermediate_size": 5, "num_key_value_heads": 1, "head_dim": 1}


def case_of(engine, options):
    dtype = torch.float32 if "state_dtype" in options else torch.float64
    return Case(engine=engine, dtype=dtype, options=options, model=UNEVEN)


def first_half(rank, engine, options, folder):
    run = Run(case_of(engine, options), rank)
    for number in range(3):
        run.step(number)
    # twice: the files of the first go
    save_regularizer(run.regularizer, folder)
    save_regularizer(run.regularizer, folder)
    weights = run.weights()
    for number in range(3, 5):
        run.step(number)
    return weights, run.figures[3:], run.whole_references()


def second_half(rank, engine, options, folder, weights):
    run = Run(case_of(engine, options), rank)
    run.put(weights)
    load_regularizer(run.regularizer, folder)
    loaded = run.whole_references()
    for number in range(3, 5):
        run.step(number)
    return run.figures, loaded


LAYOUTS = ["one", "ddp", "fsdp2"]


def on(two_ranks, layout, function, *arguments):
    return function(None, "ddp", *arguments) if layout == "one" else two_ranks(function, layout, *arguments)[0]


@pytest.mark.parametrize("saved_by", LAYOUTS)
@pytest.mark.parametrize("loaded_by", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit"}], ids=str)
def test_another_number_of_ranks(two_ranks, tmp_path, saved_by, loaded_by, options):
    weights, figures, _ = on(two_ranks, saved_by, first_half, options, tmp_path)
    assert len(list(tmp_path.iterdir())) == (3 if saved_by == "fsdp2" else 2)
    resumed, _ = on(two_ranks, loaded_by, second_half, options, tmp_path, weights)
    bound = 1e-9 if not options else 0.05 if options["state_dtype"] == "8bit" else 1e-3
    for theirs, ours in zip(resumed, figures, strict=True):
        assert theirs["penalty"] == pytest.approx(ours["penalty"], rel=bound)
    if saved_by == loaded_by:
        # the same layout: bit by bit
        assert resumed == figures


def test_damaged_and_other_states(tmp_path):
    model = tiny_llama()
    run = Run(Case())
    run.step(0)
    with pytest.raises(FileNotFoundError, match=r"has no regularizer\.json"):
        load_regularizer(run.regularizer, tmp_path)
    save_regularizer(run.regularizer, tmp_path)
    fresh = SSIUURegularizer(model, weight=WEIGHT)
    unchanged = copy.deepcopy(fresh.state_dict())

    def refused(regularizer, message):
        with pytest.raises(ValueError, match=message):
            load_regularizer(regularizer, tmp_path)
        assert regularizer.state_dict() == {**unchanged, "settings": regularizer.state_dict()["settings"]}

    refused(SSIUURegularizer(model, weight=WEIGHT, every=2), "every=1, this regulariser every=2")
    refused(SSIUURegularizer(model, weight=WEIGHT, parameters=["*up_proj*"]), "of other parameters")
    refused(SSIUURegularizer(tiny_llama(intermediate_size=8), weight=WEIGHT), r"mlp\..* as \[")
    (tensors,) = tmp_path.glob("*.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:1000])
    refused(fresh, "can't be read")
    tensors.write_bytes(whole)
    path = tmp_path / "regularizer.json"
    content = json.loads(path.read_text())
    path.write_text("[1, 2]")
    refused(fresh, "damaged or of another kind")
    path.write_text(json.dumps(content | {"version": 7}))
    refused(fresh, "state version 7")
    path.write_text(json.dumps(content))
    load_regularizer(fresh, tmp_path)
    assert fresh.state_dict()["step"] == 1


def damages(content):
    """Contents of regularizer.json that were never written, by what is wrong with them."""
    (file,) = content["files"]
    for key, value in (
        ("files", [file]),
        ("files", {}),
        ("files", {file: 3}),
        ("files", {file: {"0.weight": {"size": [8, 8]}}}),
        ("files", {f"../{file}": None}),
        ("has_references", False),
        ("has_references", "yes"),
        ("settings", []),
        ("step", "7"),
        ("weight", "7"),
        ("ratios", None),
        ("reference_samples", "x"),
    ):
        yield content | {key: value}


def test_a_damaged_json_is_a_value_error_and_changes_nothing(tmp_path):
    run = Run(Case())
    run.step(0)
    save_regularizer(run.regularizer, tmp_path)
    fresh = SSIUURegularizer(run.inner, weight=WEIGHT)
    path = tmp_path / "regularizer.json"
    for damaged in damages(json.loads(path.read_text())):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is damaged"):
            load_regularizer(fresh, tmp_path)
        assert fresh.state_dict()["references"] is None


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    run = Run(Case())
    run.step(0)
    (tmp_path / "regularizer-0123456789ab-00000.safetensors.part").touch()
    (tmp_path / "regularizer-0123456789ab-00000.safetensors").touch()
    save_regularizer(run.regularizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_is_loaded_between_micro_batches(tmp_path):
    run = Run(Case())
    run.step(0)
    save_regularizer(run.regularizer, tmp_path)
    run.regularizer.backward(log_probs_of(run.model, rows_of(1, run.case)), last=False)
    load_regularizer(run.regularizer, tmp_path)
    assert run.regularizer.state_dict()["step"] == 1


def refused_on_one_rank(rank, engine, folder):
    """Rank 1's regulariser has other options than what was saved, or there is nothing to load."""
    run = Run(Case(engine=engine), rank)
    other = Run(Case(engine=engine, options={"every": 1 + rank}), rank).regularizer
    said = []
    for place in (folder, folder / "none"):
        if place == folder:
            run.step(0)
            save_regularizer(run.regularizer, folder)
        try:
            load_regularizer(other, place)
        except Exception as error:
            said.append((type(error).__name__, str(error)))
        assert other.state_dict()["step"] == 0
        assert other.state_dict()["references"] is None
    # nobody waits
    return said, run.regularizer.agreement.ranks.gather(rank)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_state_that_one_rank_refuses_changes_none(two_ranks, tmp_path, engine):
    (zero, ranks), (one, same) = two_ranks(refused_on_one_rank, engine, tmp_path)
    assert ranks == same == [0, 1]
    assert [kind for kind, _ in zero] == [kind for kind, _ in one] == ["ValueError", "FileNotFoundError"]
    assert zero[0][1] == "on rank 1: " + one[0][1]
    assert "every=1, this regulariser every=2" in one[0][1]


def test_a_save_that_fails_leaves_the_one_before_it(tmp_path, monkeypatch):
    run = Run(Case())
    run.step(0)
    save_regularizer(run.regularizer, tmp_path)
    before = copy.deepcopy(run.regularizer.state_dict())
    run.step(1)
    replace = __import__("os").replace

    def no_json(source, target):
        if str(target).endswith(".json"):
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr("os.replace", no_json)
    with pytest.raises(OSError, match="disk is full"):
        save_regularizer(run.regularizer, tmp_path)
    monkeypatch.undo()
    other = SSIUURegularizer(run.inner, weight=WEIGHT)
    load_regularizer(other, tmp_path)
    after = other.state_dict()
    assert after["step"] == before["step"] == 1
    for name, tensor in before["references"].items():
        assert (after["references"][name] == tensor).all()


NEURONS = {"granularity": "neuron", "weight": 1e-2, "target": "log_probability"}


def neurons_saved_and_loaded(rank, engine, reference, folder, save, load):
    """What the references are taken from, or loaded; and the step after it."""
    run = Run(Case(engine=engine), rank)
    regularizer = SSIUURegularizer(run.model, reference=reference, **NEURONS)
    ids = torch.arange(6) if rank is None else torch.arange(4) if rank == 0 else torch.arange(4, 6)
    mean = 1 if rank is None else 2

    def step():
        log_probs = log_probs_of(run.model, run.share(rows_of(0, run.case))[0])
        penalty = regularizer.backward(log_probs, sample_ids=ids).item()
        (mean * log_probs.sum()).backward()
        gradients = run.whole((name, p.grad) for name, p in run.inner.named_parameters())
        run.optimizer.zero_grad()
        return penalty, gradients

    if load:
        load_regularizer(regularizer, folder)
    elif reference == "initial":
        regularizer.set_reference([(log_probs_of(run.model, run.share(rows_of(0, run.case))[0]), None, ids)])
    else:
        step()
    if save:
        save_regularizer(regularizer, folder)
    with torch.no_grad():
        for p in run.inner.parameters():
            p.mul_(1.01)
    return step()


@pytest.mark.parametrize("saved_by", LAYOUTS)
@pytest.mark.parametrize("loaded_by", LAYOUTS)
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_neurons(two_ranks, tmp_path, saved_by, loaded_by, reference):
    def go(layout, *arguments):
        call = neurons_saved_and_loaded
        return call(None, "ddp", *arguments) if layout == "one" else two_ranks(call, layout, *arguments)[0]

    penalty, gradients = go(saved_by, reference, tmp_path, True, False)
    # all ranks hold the same, and the first one writes it
    assert len(list(tmp_path.iterdir())) == 2
    assert penalty > 0
    state = json.loads((tmp_path / "regularizer.json").read_text())
    assert reference == "previous" or state["reference_complete"]
    resumed, theirs = go(loaded_by, reference, tmp_path, False, True)
    assert resumed == pytest.approx(penalty, rel=1e-9)
    for name, gradient in gradients.items():
        assert (theirs[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name
    if saved_by == loaded_by:
        assert resumed == penalty
