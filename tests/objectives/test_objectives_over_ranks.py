"""Two gloo processes under DDP and FSDP2 end where one process does."""

import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing
from plain_objectives import encoded, totals
from tiny import batch, exactly, part, tiny_gpt2, tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ssiuu_fast.engines import bare
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.objective import ForgetBatch
from ssiuu_fast.objectives.reference import model_fingerprint, reference_log_probs

FORGET, RETAIN, ROWS = batch(4, seed=1), batch(4, seed=3), batch(7, seed=5)
WORLD = 2


def llama():
    # 25 rows don't divide by two ranks
    return exactly(tiny_llama(num_hidden_layers=3, intermediate_size=25))


def sharded(model, **options):
    for block in model.model.layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


WRAPS = {
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP2, whole weights kept after a forward pass": lambda model: sharded(model, reshard_after_forward=False),
}
# what is trained, at a learning rate that moves it
CASES = {
    "RMU": (llama, "rmu", {}, 1e-2),
    "KLUE": (llama, "klue", {"others": 2}, 1.0),
    "KLUE, weights turned around": (tiny_gpt2, "klue", {"others": 2}, 1.0),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(case, wrap=None, rank=0, world=1):
    """({name: weights after three steps}, the objective's state); each rank has its part of every batch."""
    make, name, options, learning_rate = CASES[case]
    model = make()
    objective = make_objective(name, **options)
    objective.prepare(model, encoded(FORGET), seed=0, batch_size=2)
    model = wrap(model) if wrap else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    size = len(FORGET["labels"]) // world
    forget, retain = (part(rows, rank * size, (rank + 1) * size) for rows in (FORGET, RETAIN))
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = objective.forget_loss(model, ForgetBatch(forget, size), totals(FORGET))
        # gradients are averaged over ranks
        (world * loss).backward()
        # as an evaluation does, after which FSDP2 may hold whole weights
        with torch.no_grad():
            model(input_ids=retain["input_ids"])
        (world * objective.retain_loss(model, retain, totals(RETAIN))).backward()
        objective.finish_gradients(model)
        optimizer.step()
    weights = {name: whole(parameter.detach()) for name, parameter in bare(model).named_parameters()}
    return weights, objective.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name] for name in a
    )


def unwanted(module, inputs):
    raise AssertionError("the cache was not read")


def check(rank, file, expected, references, fingerprint):
    """In each of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    for case, (weights, state) in expected.items():
        for kind, wrap in WRAPS.items():
            found, found_state = train(case, wrap, rank, WORLD)
            assert same(found_state, state), (case, kind)
            for name in weights:
                difference = (found[name] - weights[name]).abs().max()
                assert difference <= 1e-9 * weights[name].abs().max(), (case, kind, name)
    model = sharded(llama())
    assert model_fingerprint(model) == fingerprint
    # four batches, then one: a rank without a batch must run all the same
    for batch_size in (2, 7):
        found = reference_log_probs(model, encoded(ROWS), None, batch_size=batch_size)
        torch.testing.assert_close(found, references, rtol=1e-12, atol=0)
    folder = f"{file}.cache"
    first = reference_log_probs(model, encoded(ROWS), folder)
    model.register_forward_pre_hook(unwanted)
    assert torch.equal(reference_log_probs(model, encoded(ROWS), folder), first)
    dist.destroy_process_group()


def test_two_processes_end_where_one_does(tmp_path):
    expected = {case: train(case) for case in CASES}
    for case, (weights, _) in expected.items():
        start = dict(CASES[case][0]().named_parameters())
        moved = max((weights[name] - start[name]).abs().max() / start[name].abs().max() for name in weights)
        assert moved > 1e-4, case
    references = reference_log_probs(llama(), encoded(ROWS), None)
    arguments = (str(tmp_path / "store"), expected, references, model_fingerprint(llama()))
    # forked: what is imported and made stays so
    torch.multiprocessing.start_processes(check, arguments, nprocs=WORLD, start_method="fork")
