"""A sampler over the rows that were kept: the same on every rank, and resumable in the middle of an epoch."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from aidefend._core.checks import check_flag, check_int, check_kind, check_tensor, refuse
from aidefend._core.random import derive_seed, make_generator


class KeptSampler(Sampler[int]):
    """Row numbers of the kept rows, for `DataLoader(dataset, sampler=...)` over the data as it is.

    Guarantee: no row outside `kept` is ever drawn, on any rank. Over all ranks an epoch draws every kept row once;
        where they cannot be shared out evenly, the last ranks draw one of the epoch's first rows again, so that all
        ranks take the same number of steps. A run that resumes from `state_dict` draws what the interrupted one would
        have drawn. An epoch that was left half-way is not taken up again: the next `iter` begins the next one,
        whole, unless `load_state_dict` said where to go on.
    Args:
        kept: Row numbers (K,) int64.
        shuffle: A new order each epoch, from seed and epoch; else ascending.
        seed: Of the orders; the same on all ranks.
        rank, world_size: Of this process and in all.
    Example:
        >>> sampler = KeptSampler(torch.tensor([0, 2, 5, 7]), shuffle=False, rank=1, world_size=2)
        >>> list(sampler)
        [2, 7]
    """

    def __init__(self, kept: Tensor, shuffle: bool = True, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        rows = check_tensor(kept, "kept", ndim=1).detach().cpu()
        if rows.is_floating_point() or rows.dtype == torch.bool or (len(rows) and int(rows.min()) < 0):
            raise refuse("row numbers >= 0", "kept", kept, "Pass report.keep_indices")
        self.kept, self.shuffle, self.seed = rows.clone(), check_flag(shuffle, "shuffle"), check_int(seed, "seed", 0)
        self.world_size = check_int(world_size, "world_size")
        self.rank = check_int(rank, "rank", 0, self.world_size - 1)
        self.epoch, self.drawn = 0, 0
        self._goes_on = False  # what was drawn of this epoch stays drawn

    def __len__(self) -> int:
        return -(-len(self.kept) // self.world_size)

    def __iter__(self) -> Iterator[int]:
        if self.drawn and not self._goes_on:
            self.epoch, self.drawn = self.epoch + 1, 0
        self._goes_on = False
        order = self._order()
        while self.drawn < len(order):
            self.drawn += 1
            yield order[self.drawn - 1]
        self.epoch, self.drawn = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch anew, as torch's DistributedSampler has it; not needed where epochs follow one another."""
        self.epoch, self.drawn = check_int(epoch, "epoch", 0), 0
        self._goes_on = False

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, the same on every rank at the same step: JSON types.

        A DataLoader draws ahead: with workers, save the number of batches that the loop has used and pass it on as
        `{"epoch": epoch, "drawn": batches * batch_size, ...}`.
        """
        return {"epoch": self.epoch, "drawn": self.drawn, **self._setting()}

    def load_state_dict(self, state: Any) -> None:
        """Go on from `state_dict()`, of this rank or another one.

        Raises: ConfigurationError: it is of another seed, of other rows, of another number of ranks (a step is another
            share of the epoch there: begin an epoch anew), or shuffled where this one is not.
        """
        check_kind(state, dict, "state", "Pass what state_dict() returned")
        setting = self._setting()
        if {name: state.get(name) for name in setting} != setting:
            cure = "Build the sampler from the same report and seed, for as many ranks"
            raise refuse(f"the state of a sampler with {setting}", "state", state, cure)
        self.epoch = check_int(state.get("epoch"), "epoch", 0)
        self.drawn = check_int(state.get("drawn"), "drawn", 0, len(self))
        self._goes_on = True

    def _setting(self) -> dict[str, Any]:
        """What two samplers that draw the same rows on the same steps have in common."""
        setting = {"seed": self.seed, "shuffle": self.shuffle, "world_size": self.world_size}
        return {**setting, "kept": len(self.kept), "rows": self._digest}

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.kept.long().numpy().tobytes()).hexdigest()

    def _order(self) -> list[int]:
        rows = self.kept
        if self.shuffle:
            stream = make_generator(seed=derive_seed(self.seed, "kept", self.epoch) % 2**63)
            rows = rows[torch.randperm(len(rows), generator=stream)]
        missing = len(self) * self.world_size - len(rows)
        whole = torch.cat([rows, rows.repeat(-(-missing // max(1, len(rows))))[:missing]]) if missing else rows
        order: list[int] = whole[self.rank :: self.world_size].tolist()
        return order
