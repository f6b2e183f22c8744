"""A few steps of unlearning in one process or on two ranks, which must come to the same."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from steps import WEIGHT
from tiny import batch, exactly, log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, answer_token_counts

# forget rows of a step, and where rank 1's begin: rank 0 has more
ROWS, SPLIT = 6, 4


@dataclass
class Case:
    engine: str = "ddp"
    dtype: torch.dtype = torch.float64
    optimizer: str = "sgd"
    steps: int = 10
    micro_batches: int = 1
    scale: float = 1.0
    options: dict = field(default_factory=dict)
    wrapper: dict = field(default_factory=dict)  # of DDP or fully_shard
    model: dict = field(default_factory=dict)
    no_sync: bool = False
    checkpointing: bool = False
    route: bool = False
    # on the ranks; the one process always takes two passes
    one_backward: bool = False


class Routed(nn.Module):
    """Each row adds the output of one of its blocks, or of none: some parameters are in some rows' graph only."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        self.head = nn.Linear(6, 48)
        self.to(dtype)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        # even first tokens go through block 0, odd ones through 1; nobody goes through 2
        used = input_ids[:, 0] % 2
        for index in used.unique().tolist():
            hidden = hidden + torch.where((used == index)[:, None, None], self.blocks[index](hidden).tanh(), 0.0)
        return _Output(self.head(hidden))


class _Output(dict):
    """In which DDP finds the tensor, as in the outputs of transformers."""

    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


def make_model(case):
    model = Routed(case.dtype) if case.route else exactly(tiny_llama(case.dtype, **case.model))
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def shard(model, mesh_shape=None, offload=False, fill=True, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if mesh_shape is not None:
        options["mesh"] = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    # what only some ranks run has to be gathered with what all run
    for block in [] if isinstance(model, Routed) else model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    if isinstance(model, Routed) and fill:
        model.set_reduce_scatter_unused_params(True)
    return model


def wrap(model, case):
    if case.engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, **case.wrapper)
    return shard(model, **case.wrapper) if case.engine == "fsdp2" else model


def rows_of(step, case):
    rows = batch(samples=ROWS, seed=step)
    if case.route:
        # block 0 for rank 0's rows, block 1 for rank 1's
        rows["input_ids"][:SPLIT, 0] = 2
        rows["input_ids"][SPLIT:, 0] = 3
    return rows


class Run:
    """One run; rank None is the one process that does it all."""

    def __init__(self, case, rank=None, state=None):
        self.case, self.rank = case, rank
        self.inner = make_model(case)
        self.model = self.inner if rank is None else wrap(self.inner, case)
        self.regularizer = SSIUURegularizer(self.model, **({"weight": WEIGHT} | case.options))
        make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[case.optimizer]
        self.optimizer = make(self.inner.parameters(), lr={"sgd": 1e-2, "adamw": 1e-3}[case.optimizer])
        self.figures = []
        self.roads = set()

    def share(self, rows):
        """This rank's rows, micro-batch by micro-batch."""
        if self.rank is not None:
            rows = part(rows, *((0, SPLIT) if self.rank == 0 else (SPLIT, ROWS)))
        size = -(-len(rows["labels"]) // self.case.micro_batches)
        return [part(rows, start, start + size) for start in range(0, len(rows["labels"]), size)]

    def set_reference(self):
        batches = [some for seed in range(3) for some in self.share(rows_of(seed, self.case))]
        model = self.inner if self.case.engine == "ddp" else self.model
        self.regularizer.set_reference(log_probs_of(model, some) for some in batches)

    def step(self, number):
        case = self.case
        rows = rows_of(number, case)
        tokens = answer_token_counts(rows["labels"]).sum()
        parts = self.share(rows)
        # DDP and FSDP2 give the mean over ranks
        mean = 1 if self.rank is None else 2
        for index, some in enumerate(parts):
            last = index == len(parts) - 1
            quiet = self.model.no_sync() if case.no_sync and self.rank is not None and not last else nullcontext()
            with quiet:
                log_probs = log_probs_of(self.model, some)
                loss = case.scale * mean * log_probs.sum() / tokens
                if case.one_backward and self.rank is not None:
                    penalty = self.regularizer.backward(log_probs, last=last, scale=case.scale, loss=loss)
                    self.roads.add(self.regularizer.road)
                else:
                    penalty = self.regularizer.backward(log_probs, last=last, scale=case.scale)
                    loss.backward()
        if self.regularizer.relative_weight is not None:
            self.regularizer.after_backward(case.scale)
        for p in self.inner.parameters():
            if p.grad is not None:
                p.grad.div_(case.scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        last = self.regularizer.last_step
        self.figures.append(
            {
                "penalty": penalty.item(),
                "share": last.negative_share,
                "norm": last.penalty_gradient_norm,
                "underflows": last.underflows,
                "nonfinite": last.nonfinite,
                "absent": last.absent,
                "weight": last.weight,
                "change": last.relative_change,
            }
        )

    def whole(self, tensors):
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for name, t in tensors}

    def weights(self):
        return self.whole(self.inner.named_parameters())

    def whole_references(self):
        return {name: t.detach().clone() for name, t in self.regularizer.state_dict()["references"].items()}

    @torch.no_grad()
    def put(self, weights):
        """Takes up whole weights."""
        for name, p in self.inner.named_parameters():
            if hasattr(p, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                p.copy_(distribute_tensor(weights[name].detach(), p.device_mesh, p.placements))
            else:
                p.copy_(weights[name])

    def go(self):
        if self.regularizer.reference == "initial":
            self.set_reference()
        for number in range(self.case.steps):
            self.step(number)
        if self.case.one_backward and self.rank is not None:
            expected = "two backwards: under FSDP2" if self.case.engine == "fsdp2" else "one backward"
            assert all(road.startswith(expected) for road in self.roads), self.roads
        return self.weights(), self.figures


def run(rank, case):
    return Run(case, rank).go()


def objective_gradients(rank, weight):
    """A loss's gradients beside a regulariser that is built while the last norm and the head are gathered.

    weight None: without one. Its penalty is 0 in the first step.
    """
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama(torch.float64)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    rows = part(batch(samples=ROWS), rank * 3, rank * 3 + 3)
    with torch.no_grad():
        log_probs_of(model, rows)
    regularizer = None if weight is None else SSIUURegularizer(model, weight=weight)
    log_probs = log_probs_of(model, rows)
    if regularizer is not None:
        regularizer.backward(log_probs)
    log_probs.sum().backward()
    model.reshard()
    model.model.norm.reshard()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
