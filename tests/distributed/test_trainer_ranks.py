"""UnlearningTrainer on two gloo ranks, under DDP and FSDP2, ends where one process does."""

import pytest
import torch
from tiny import tiny_llama
from trainer_runs import refused, run, run_from_the_first_rank, with_texts

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 10}
FIXED = {"threshold": None}
UNSCORED = {"eval_strategy": "no", "eval_on_start": False, **FIXED}
# options of exact cases: fp64 and SGD. 11 forget rows a step are 5 and 6 on two ranks
EXACT = {
    "gd": {"relative_weight": 3.0},
    "gd, batches that wrap, accumulation": {
        "relative_weight": 3.0,
        "gradient_accumulation_steps": 2,
        "rows_per_step": 8,
    },
    "npo": {"objective": "npo", "relative_weight": 3.0},
    "dpo": {
        "objective": "dpo",
        "texts": True,
        "target": "mean_token_probability",
        "relative_weight": 3.0,
        **UNSCORED,
    },
    "initial": {"reference": "initial", "relative_weight": 3.0, "gradient_accumulation_steps": 2},
    "rmu": {"objective": "rmu", "relative_weight": 3.0},
    "klue": {
        "objective": "klue",
        "objective_options": {"others": 2},
        "relative_weight": 3.0,
        "learning_rate": 1.0,
    },
}


def starting_weights(options, dtype=torch.float64):
    model = with_texts(dtype)[0] if options.get("texts") else tiny_llama(dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(found, expected, start, tolerance):
    """To `tolerance` of the most that any weight moved."""
    moved = max((tensor - start[name]).abs().max().item() for name, tensor in expected["weights"].items())
    assert moved > 1e-3
    for name, tensor in expected["weights"].items():
        difference = (found["weights"][name] - tensor).abs().max().item()
        assert difference <= tolerance * moved, (name, difference / moved)
    for name in ("steps", "kept_epoch", "stopped_by"):
        assert found[name] == expected[name]
    for name in ("scores", "losses", "penalties"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3 if tolerance > 1e-6 else 1e-5, abs=1e-30)


def equal_weights(a, b):
    return all(torch.equal(tensor, b["weights"][name]) for name, tensor in a["weights"].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outcome of options in one process, computed once."""
    known = {}

    def get(name, options):
        if name not in known:
            known[name] = run(None, tmp_path_factory.mktemp("alone"), options=options)
        return known[name]

    return get


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_are_one_process(two_ranks, tmp_path, alone, name, engine):
    options = SGD | FIXED | EXACT[name]
    expected = alone(name, options)
    first, second = two_ranks(run, tmp_path, engine, options)
    assert equal_weights(first, second)
    assert expected["penalties"][-1] > 1e-12
    assert_same(first, expected, starting_weights(options), 1e-9)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_adamw_in_single_precision(two_ranks, tmp_path, alone, engine):
    options = {"dtype": torch.float32, "learning_rate": 1e-3, "max_steps": 10, "relative_weight": 3.0, **FIXED}
    first, _ = two_ranks(run, tmp_path, engine, options)
    assert_same(first, alone("adamw", options), starting_weights(options, torch.float32), 1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_both_stop_at_the_threshold(two_ranks, tmp_path, alone, engine):
    options = {"texts": True, "learning_rate": 1e-2, "max_steps": 10, "relative_weight": 1.0}
    options |= {"target": "mean_token_probability", "threshold": 0.1}
    whole = alone("texts", options)
    assert (whole["stopped_by"], whole["steps"]) == ("threshold", 2)
    found = two_ranks(run, tmp_path, engine, options)
    for rank in found:
        for name in ("stopped_by", "steps", "scores", "kept_epoch"):
            assert rank[name] == whole[name]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_best_weights_and_a_resumed_run(two_ranks, tmp_path, alone, engine):
    # FSDP2 can't load the state of an optimizer without tensors; an epsilon that keeps rounding small
    options = {"learning_rate": 2e-3, "adam_epsilon": 1e-3, "max_steps": 10, "relative_weight": 3.0}
    options |= {"valley": 0.325, "eval_strategy": "steps", "eval_steps": 1}
    expected = alone("valley", options)
    lowest = min(range(11), key=lambda step: expected["scores"][step])
    # the best weights are from before the checkpoint; no save comes between the last score and them
    assert 0 < lowest < 5
    saved = options | {"save_strategy": "steps", "save_steps": 7}
    first, second = two_ranks(run, tmp_path, engine, saved)
    assert equal_weights(first, second)
    assert_same(first, expected, starting_weights(options), 1e-9)
    assert first["score_at_the_end"] == pytest.approx(expected["scores"][lowest], rel=1e-9)
    again, _ = two_ranks(run, tmp_path, engine, saved, "checkpoint-7")
    assert equal_weights(again, first) and again["scores"] == first["scores"]
    assert again["penalties"] == first["penalties"]
    if engine == "ddp":
        on_one = run(None, tmp_path, options=saved, resume="checkpoint-7")
        assert_same(on_one, expected, starting_weights(options), 1e-9)


REFUSED = {
    "sync off": "gradient sync is off under FSDP2",
    "meta": "embed_tokens.weight is on the meta device of some rank",
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused_on_both_ranks(two_ranks, tmp_path, how):
    for said, step in two_ranks(refused, tmp_path, SGD | FIXED, how):
        assert REFUSED[how] in said and step == 0


@pytest.mark.parametrize("name", ["rmu", "klue"])
def test_the_first_ranks_weights_count(two_ranks, tmp_path, alone, name):
    options = SGD | FIXED | EXACT[name]
    found = two_ranks(run_from_the_first_rank, tmp_path, options)
    assert_same(found[0], alone(name, options), starting_weights(options), 1e-9)
