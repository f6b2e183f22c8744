"""The weights of the lowest forget score so far, in host memory."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssiuu_fast.ranks import Ranks
from ssiuu_fast.shards import from_local_part, is_sharded, local_part, sharded_as, whole


class BestWeights:
    """A copy of what training changes: the parameters that require grad, and buffers.

    Each rank keeps its own shards of a sharded model; of a replicated one the first rank keeps all. score, step, epoch:
    of the copy.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.score = float("inf")
        self.step = 0
        self.epoch = 0.0
        self._ranks = ranks
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers
        self._kept: dict[str, Tensor] = {}

    @property
    def kept(self) -> bool:
        """Whether any evaluation kept weights."""
        return self.score < float("inf")

    @torch.no_grad()
    def offer(self, score: float, step: int, epoch: float) -> None:
        """Keeps the model's weights if their score is the lowest, the first of the lowest."""
        if score < self.score:
            self.score, self.step, self.epoch = score, step, epoch
            self._kept = {
                name: local_part(tensor).detach().to("cpu", copy=True)
                for name, tensor in self._live.items()
                if self._keeps(tensor)
            }

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the kept weights back, if any evaluation kept some; every rank calls it."""
        if not self.kept:
            return
        for name, tensor in self._live.items():
            if self._keeps(tensor):
                local_part(tensor).copy_(self._kept[name])
            if self._ranks.size > 1 and not is_sharded(tensor):
                dist.broadcast(tensor.data, src=0, group=self._ranks.group)

    def meta(self) -> dict:
        return {"score": self.score, "step": self.step, "epoch": self.epoch}

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """Whole tensors, written by the first rank; every rank calls it."""
        values = {}
        for name, tensor in self._live.items():
            if is_sharded(tensor):
                gathered = whole(from_local_part(tensor, self._kept[name].to(tensor.device)))
                if self._ranks.rank == 0:
                    values[name] = gathered.cpu()
            elif self._keeps(tensor):
                values[name] = self._kept[name].contiguous()
        if self._ranks.rank == 0:
            save_file(values, path)

    @torch.no_grad()
    def load(self, path: Path | None, meta: dict) -> None:
        """What `save` wrote, or with path None the model's own weights, kept under the numbers of `meta`."""
        self.offer(float("-inf"), 0, 0.0)
        self.score, self.step, self.epoch = meta["score"], meta["step"], meta["epoch"]
        if path is None:
            return
        with safe_open(path, framework="pt") as saved:
            for name, tensor in self._live.items():
                if not self._keeps(tensor):
                    continue
                values = saved.get_tensor(name)
                if is_sharded(tensor):
                    values = local_part(sharded_as(tensor, values))
                self._kept[name].copy_(values)

    def _keeps(self, tensor: Tensor) -> bool:
        return is_sharded(tensor) or self._ranks.rank == 0
