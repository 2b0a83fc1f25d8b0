"""The processes that share one private run: each draws from rows of its own, one adds the noise, all take one step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.modules import device_of
from aidefend.privacy.step_book import refused

_REFUSED = -1


class Ranks:
    """One process, or the members of a `torch.distributed` group with the same model, data set and configuration.

    Row i of the data set belongs to process i mod count, which lets it join a batch with the sample rate: together the
    batches are Poisson batches of the whole data set. The clipped sums of all processes are added up, with the noise of
    the first one among them.
    """

    def __init__(self, group: Any, model: nn.Module) -> None:
        self._group = _checked(group)
        self._device = device_of(model)
        self.index = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this process adds the noise and keeps the files."""
        return self.index == 0

    def mine(self, rows: int) -> Any:
        """Which of so many rows are this process's own, a mask."""
        return np.arange(rows) % self.count == self.index

    def begin(self, model: nn.Module, digest: str) -> None:
        """Start all processes from the weights of the first; refuses different configurations."""
        if self.count == 1:
            return
        ours = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=self._device)
        theirs = ours.clone()
        self._broadcast(theirs)
        differ = (ours != theirs).any().to(torch.int64).reshape(1)
        dist.all_reduce(differ, group=self._group)
        if int(differ):
            cure = "Build the same PrivacyConfig in every process; solve target_epsilon once and pass noise_multiplier"
            raise refused("one configuration in all processes", "processes that differ", int(differ), cure)
        for tensor in (*model.parameters(), *model.buffers()):
            self._broadcast(tensor.data)

    def add_up(self, tensor: Tensor) -> None:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self._group)

    def number(self, value: float) -> float:
        """The sum of one number over all processes."""
        if self.count == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64).to(self._device)
        dist.all_reduce(found, group=self._group)
        return float(found)

    def of_first(self, numbers: Any) -> Any:
        """The first process's array, in all processes."""
        if self.count == 1:
            return numbers
        told = torch.from_numpy(numbers.copy()).to(self._device)
        self._broadcast(told)
        return told.cpu().numpy()

    def by_first(self, action: Callable[[], int]) -> int:
        """What the first process's action returns (>= 0); where it raises, all processes stop."""
        if self.count == 1:
            return action()
        found, error = _REFUSED, None
        if self.first:
            try:
                found = action()
            except Exception as raised:
                error = raised
        told = torch.tensor([found], dtype=torch.int64, device=self._device)
        self._broadcast(told)
        if error is not None:
            raise error
        if int(told) == _REFUSED:
            cure = "See the error of the first process"
            raise refused("the first process to go on", "first process", "refused", cure)
        return int(told)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, dist.get_global_rank(self._group, 0), group=self._group)


def _checked(group: Any) -> Any:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if group is None and several:
        cure = "Pass group=torch.distributed.group.WORLD: one run over all processes. Separate runs would each spend"
        raise refused("the group of processes that share the run", "group", None, f"{cure} the budget")
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        cure = "Pass torch.distributed.group.WORLD after init_process_group, or None"
        raise refuse("group to be a torch.distributed process group", "group", type(group).__name__, cure)
    return group
