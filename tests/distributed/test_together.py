"""What one rank can't go on with is raised on both, and what can't work on several ranks is refused."""

import pytest
import torch
from rank_runs import Case, Run, make_model, rows_of, shard
from tiny import log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.loop.fingerprint import frozen_fingerprint
from ssiuu_fast.neuron_ranks import ShardedModels


def caught(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def broken_log_probs(rank, engine, when):
    """Rank 1's micro-batch `when` of two is broken; then a sound step, which shows that nobody waits."""
    run = Run(Case(engine=engine, micro_batches=2, no_sync=engine == "ddp"), rank)
    run.step(0)
    held = {name: p.grad for name, p in run.inner.named_parameters()}
    said = []

    def step():
        for index, some in enumerate(run.share(rows_of(1, run.case))):
            log_probs = log_probs_of(run.inner if engine == "ddp" else run.model, some)
            if rank == 1 and index == when:
                log_probs = log_probs * float("nan")
            run.regularizer.backward(log_probs, last=index == 1)

    said.append(caught(step))
    assert all(p.grad is held[name] for name, p in run.inner.named_parameters())
    run.step(2)
    return said, run.figures[-1]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("when", [0, 1])
def test_an_error_of_one_rank_is_one_of_all(two_ranks, engine, when):
    (zero, figures), (one, same) = two_ranks(broken_log_probs, engine, when)
    assert one[0][0] == zero[0][0] == "ValueError"
    assert "log_probs[0] is nan" in one[0][1]
    assert zero[0][1].startswith("on rank 1: log_probs[0] is nan")
    assert figures == same


def other_graph(rank, engine):
    run = Run(Case(engine=engine), rank)
    run.step(0)
    rows = run.share(rows_of(1, run.case))[0]
    # a forward pass is one of all ranks
    log_probs = log_probs_of(run.model, rows)
    if rank == 0:
        log_probs = log_probs_of(tiny_llama(), rows)
    return caught(lambda: run.regularizer.backward(log_probs))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_no_parameter_in_the_graph_of_one_rank(two_ranks, engine):
    zero, one = two_ranks(other_graph, engine)
    assert zero[0] == one[0] == "RuntimeError"
    assert "0 of 14 regularised parameters are in this graph" in zero[1]
    assert one[1].startswith("on rank 0: 0 of 14")


def used_on_one_rank(rank, fill):
    """Rank 0's rows go through block 0, rank 1's through block 1."""
    run = Run(Case(engine="fsdp2", route=True, wrapper={"fill": fill}), rank)
    log_probs = log_probs_of(run.model, run.share(rows_of(0, run.case))[0])
    said = caught(lambda: run.regularizer.backward(log_probs))
    assert run.regularizer.state_dict()["step"] == (said is None)
    return said


def test_a_parameter_in_the_graph_of_one_rank_only(two_ranks):
    """FSDP2 would add the gradient of one block to the other's."""
    for kind, message in two_ranks(used_on_one_rank, False):
        assert kind == "ValueError"
        assert message.startswith("blocks.0.weight is in the graph on 1 of 2 ranks, and 2 parameters in all")
        assert "set_reduce_scatter_unused_params(True)" in message
    assert two_ranks(used_on_one_rank, True) == [None, None]


def other_torch(rank):
    from ssiuu_fast import sharded

    model = shard(make_model(Case()))
    del sharded.parameter_groups(model)[0].reduce_grads
    return caught(lambda: SSIUURegularizer(model))


def test_private_parts_that_are_not_there(two_ranks):
    for kind, message in two_ranks(other_torch):
        assert kind == "RuntimeError"
        assert message.startswith(f"FSDPParamGroup of torch {torch.__version__} has no reduce_grads")
        assert "as they are in torch 2.13" in message


def plain_model_calibrated(rank, averaged):
    """The loop averages .grad over the ranks itself, before after_backward or after it."""
    model = tiny_llama(torch.float64)
    regularizer = SSIUURegularizer(model, relative_weight=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for number in range(7):
        rows = part(rows_of(number, Case()), rank * 3, rank * 3 + 3)
        log_probs = log_probs_of(model, rows)
        regularizer.backward(log_probs)
        log_probs.sum().backward()
        if not averaged:
            return caught(regularizer.after_backward)
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad.div_(2)
        regularizer.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return regularizer.weight


def test_calibration_before_the_loop_averages(two_ranks):
    zero, one = two_ranks(plain_model_calibrated, True)
    assert zero == one > 0
    zero, one = two_ranks(plain_model_calibrated, False)
    assert zero == one
    assert zero[0] == "ValueError"
    assert "call after_backward after the loop has averaged .grad over the ranks" in zero[1]


def empty_share(rank, engine):
    run = Run(Case(engine=engine, options={"reference": "initial"}), rank)
    if engine == "ddp":
        log_probs = log_probs_of(run.model, rows_of(0, run.case))
        return caught(lambda: run.regularizer.backward(log_probs[: 6 * (1 - rank)]))
    graphs = [log_probs_of(run.model, rows_of(0, run.case)) for _ in range(2)]
    return caught(lambda: run.regularizer.set_reference(graphs[: 2 - rank]))


def test_a_rank_without_samples(two_ranks):
    zero, one = two_ranks(empty_share, "ddp")
    assert zero[0] == one[0] == "ValueError"
    assert "log_probs is empty" in one[1]
    zero, one = two_ranks(empty_share, "fsdp2")
    assert zero[0] == one[0] == "ValueError"
    assert "one more batch on 1 of 2 ranks" in zero[1]
    assert zero[1] == one[1]


def other_dtypes(rank):
    """FSDP2 computes in another dtype than it stores and reduces in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run = Run(Case(engine="fsdp2", dtype=torch.float32, wrapper={"mp_policy": policy}, steps=3), rank)
    run.go()
    return run.figures


def test_mixed_precision_of_fsdp2(two_ranks):
    zero, one = two_ranks(other_dtypes)
    alone = Run(Case(dtype=torch.float32, steps=3))
    alone.go()
    assert zero == one
    for theirs, ours in zip(zero[1:], alone.figures[1:], strict=True):
        # bf16 has 8 bits, and these steps leave each other
        assert theirs["penalty"] == pytest.approx(ours["penalty"], rel=0.5)
        assert theirs["nonfinite"] == 0


def fingerprints(rank):
    model = make_model(Case())
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    return frozen_fingerprint(model), frozen_fingerprint(shard(model))


def test_the_fingerprint_of_frozen_weights_is_that_of_the_whole(two_ranks):
    (whole, sharded), second = two_ranks(fingerprints)
    assert whole == sharded and second == (whole, sharded)


def refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    said = {}
    static = nn.parallel.DistributedDataParallel(tiny_llama(), static_graph=True)
    said["static"] = caught(lambda: SSIUURegularizer(static))

    model = shard(make_model(Case()))
    said["named"] = caught(lambda: SSIUURegularizer(model.named_parameters()))
    said["neuron calibrated"] = caught(lambda: SSIUURegularizer(model, granularity="neuron", relative_weight=3.0))
    elsewhere = {"up_proj": nn.Linear(1, 1, device="meta")}
    said["neuron offload"] = caught(lambda: ShardedModels(model, elsewhere, None, calibrated=False))
    said["group"] = caught(lambda: SSIUURegularizer(model, process_group=torch.distributed.new_group([rank])))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
        break
    said["steps"] = caught(lambda: SSIUURegularizer(model))

    model = shard(make_model(Case()))
    regularizer = SSIUURegularizer(model)
    rows = rows_of(0, Case())
    model.set_requires_gradient_sync(False)
    said["sync off"] = caught(lambda: regularizer.backward(log_probs_of(model, rows)))
    log_probs_of(model, rows).sum().backward()
    model.set_requires_gradient_sync(True)
    said["sync was off"] = caught(lambda: regularizer.backward(log_probs_of(model, rows)))

    model = make_model(Case())
    early = SSIUURegularizer(model)
    shard(model)
    said["early"] = caught(lambda: early.backward(log_probs_of(model, rows)))

    model = make_model(Case())
    linear = model.model.layers[0].mlp.up_proj
    mesh = init_device_mesh("cpu", (2,))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)]))
    said["tensor parallel"] = caught(lambda: SSIUURegularizer(model))
    said["neuron tensor parallel"] = caught(lambda: SSIUURegularizer(model, granularity="neuron"))

    model = make_model(Case())
    model = shard(model, reshard_after_forward=False)
    log_probs_of(model, rows)
    said["unsharded"] = caught(lambda: SSIUURegularizer(model))
    return said


def test_refusals(two_ranks):
    for said in two_ranks(refusals):
        messages = {name: error and error[1] for name, error in said.items()}
        assert "static_graph=True" in messages["static"]
        assert "give the model and not its parameters" in messages["named"]
        assert "relative_weight with granularity='neuron' under FSDP2" in messages["neuron calibrated"]
        assert "up_proj is kept off the cpu by FSDP2" in messages["neuron offload"]
        assert "process_group has other ranks than the mesh" in messages["group"]
        assert "has a hook that runs as soon as its gradient is there" in messages["steps"]
        assert "gradient sync is off under FSDP2" in messages["sync off"]
        assert "gradient sync was off under FSDP2" in messages["sync was off"]
        assert "0 of 14 regularised parameters" in messages["early"]
        assert "tensor parallel is not supported" in messages["tensor parallel"]
        assert "tensor parallel is not supported" in messages["neuron tensor parallel"]
        assert "is not sharded just now" in messages["unsharded"]
