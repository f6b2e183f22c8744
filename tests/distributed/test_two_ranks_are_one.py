"""Ten steps on two ranks come to what they come to in one process: DDP and FSDP2, each with its traps."""

import dataclasses

import pytest
import torch
from runs import Case, Run, run

FP32 = {"dtype": torch.float32, "optimizer": "adamw"}
CASES = {
    "ddp": Case(),
    "ddp fp32": Case(**FP32),
    "ddp micro-batches": Case(micro_batches=2),
    "ddp no_sync, buckets, scale": Case(
        micro_batches=2, no_sync=True, wrapper={"gradient_as_bucket_view": True}, scale=1024.0
    ),
    "ddp calibration": Case(options={"relative_weight": 3.0}),
    "ddp initial, every": Case(options={"reference": "initial", "every": 2}),
    "ddp routed": Case(route=True, wrapper={"find_unused_parameters": True}),
    "fsdp2": Case(engine="fsdp2"),
    "fsdp2 fp32": Case(engine="fsdp2", **FP32),
    "fsdp2 micro-batches, scale": Case(engine="fsdp2", micro_batches=2, scale=1024.0),
    "fsdp2 no reshard": Case(engine="fsdp2", wrapper={"reshard_after_forward": False}),
    "fsdp2 checkpointing": Case(engine="fsdp2", checkpointing=True, steps=3),
    # rows of 5 and of 1: ranks with more rows than others, and with none
    "fsdp2 uneven": Case(engine="fsdp2", model={"intermediate_size": 5, "num_key_value_heads": 1, "head_dim": 1}),
    "fsdp2 calibration": Case(engine="fsdp2", options={"relative_weight": 3.0}),
    "fsdp2 initial, every": Case(engine="fsdp2", options={"reference": "initial", "every": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(two_ranks, name):
    case = CASES[name]
    weights, figures = Run(case).go()
    ranks = two_ranks(run, case)
    bound = 1e-9 if case.dtype == torch.float64 else 1e-4
    for their_weights, their_figures in ranks:
        for key, weight in weights.items():
            assert (their_weights[key] - weight).abs().max() <= bound * weight.abs().max(), key
        for ours, theirs in zip(figures, their_figures, strict=True):
            for key in ("penalty", "share", "norm", "weight"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-7 if bound == 1e-9 else 1e-2, abs=1e-12), key
            for key in ("underflows", "nonfinite", "absent"):
                assert theirs[key] == ours[key], key
    # not one bit between ranks
    assert ranks[0][1] == ranks[1][1]
    assert all((ranks[0][0][key] == ranks[1][0][key]).all() for key in weights)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_penalty_matters_in_these_steps(engine):
    case = Case()
    with_it, figures = Run(case).go()
    without, _ = Run(dataclasses.replace(case, options={"weight": 0.0})).go()
    assert all(step["penalty"] > 0 for step in figures[1:])
    assert max((with_it[key] - without[key]).abs().max() for key in without) > 1e-6
