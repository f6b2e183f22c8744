"""Ten steps on two ranks come to what they come to in one process: DDP and FSDP2, each with its traps."""

import dataclasses

import pytest
import torch
from rank_runs import Case, Run, objective_gradients, run

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
    "ddp one backward": Case(one_backward=True),
    "ddp one backward, no_sync, scale": Case(one_backward=True, micro_batches=2, no_sync=True, scale=1024.0),
    "ddp one backward, micro-batches": Case(one_backward=True, micro_batches=2),
    "ddp one backward, calibration, buckets": Case(
        one_backward=True, options={"relative_weight": 3.0}, wrapper={"gradient_as_bucket_view": True}
    ),
    "ddp one backward, checkpointing": Case(one_backward=True, checkpointing=True, steps=3),
    "ddp one backward, routed": Case(one_backward=True, route=True, wrapper={"find_unused_parameters": True}),
    "ddp one backward, fp32": Case(one_backward=True, **FP32),
    "fsdp2 falls back": Case(engine="fsdp2", one_backward=True),
    "fsdp2": Case(engine="fsdp2"),
    "fsdp2 fp32": Case(engine="fsdp2", **FP32),
    "fsdp2 micro-batches, scale": Case(engine="fsdp2", micro_batches=2, scale=1024.0),
    "fsdp2 no reshard": Case(engine="fsdp2", wrapper={"reshard_after_forward": False}),
    "fsdp2 checkpointing": Case(engine="fsdp2", checkpointing=True, steps=3),
    # in a shard, blocks of 8-bit codes begin elsewhere
    "ddp 8bit": Case(dtype=torch.float32, options={"state_dtype": "8bit"}),
    "ddp bf16": Case(dtype=torch.float32, options={"state_dtype": torch.bfloat16}),
    "fsdp2 8bit": Case(engine="fsdp2", dtype=torch.float32, options={"state_dtype": "8bit", "weight": 1e4}),
    "fsdp2 bf16": Case(engine="fsdp2", dtype=torch.float32, options={"state_dtype": torch.bfloat16}),
    # rows of 5 and of 1: ranks with more rows than others, and with none
    "fsdp2 uneven": Case(
        engine="fsdp2",
        model={"intermediate_size": 5, "num_key_value_heads": 1, "head_dim": 1},
        options={"weight": 1e4},
    ),
    "fsdp2 routed": Case(engine="fsdp2", route=True),
    "fsdp2 copies": Case(engine="fsdp2", wrapper={"mesh_shape": (2, 1)}, options={"relative_weight": 3.0}),
    "fsdp2 one copy": Case(engine="fsdp2", wrapper={"mesh_shape": (1, 2)}),
    "fsdp2 offload": Case(engine="fsdp2", wrapper={"offload": True}),
    "fsdp2 calibration": Case(engine="fsdp2", options={"relative_weight": 3.0}),
    "fsdp2 initial, every": Case(engine="fsdp2", options={"reference": "initial", "every": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(two_ranks, name):
    case = CASES[name]
    alone = Run(case)
    start = alone.weights()
    weights, figures = alone.go()
    ranks = two_ranks(run, case)
    exact = case.dtype == torch.float64
    # in fp64 against what the steps changed, in fp32 against the weights themselves
    scales = {key: (weight - start[key] if exact else weight).abs().max() for key, weight in weights.items()}
    bound = 1e-9 if exact else 1e-4
    for their_weights, their_figures in ranks:
        for key, weight in weights.items():
            assert (their_weights[key] - weight).abs().max() <= bound * scales[key], key
        for ours, theirs in zip(figures, their_figures, strict=True):
            for key, value in ours.items():
                if key == "absent" and name == "fsdp2 routed":
                    # FSDP2 reduces zeros for parameters that nobody used: A is 0 all the same
                    continue
                # the counts and None must be the same
                near = isinstance(value, float)
                assert theirs[key] == (pytest.approx(value, rel=1e-8 if exact else 2e-2) if near else value), key
    # not one bit between ranks
    assert ranks[0][1] == ranks[1][1]
    assert all((ranks[0][0][key] == ranks[1][0][key]).all() for key in weights)


def test_the_penalty_matters_in_these_steps():
    for name, case in CASES.items():
        with_it, figures = Run(case).go()
        without, _ = Run(dataclasses.replace(case, options={"weight": 0.0})).go()
        assert sum(step["penalty"] > 0 for step in figures) >= case.steps // 2, name
        assert max((with_it[key] - without[key]).abs().max() for key in without) > 1e-6, name


def test_built_while_modules_are_gathered(two_ranks):
    plain, _ = two_ranks(objective_gradients, None)
    for gradients in two_ranks(objective_gradients, 1.0):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-12, atol=1e-14)
