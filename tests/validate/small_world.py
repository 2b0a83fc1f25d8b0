"""A small classifier with rows that it knows, rows that it does not, and collaborators that remember what they saw."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aidefend import BudgetExceeded

CENTRES = 4.0 * torch.eye(3, 6)


def model(seed: int = 0) -> nn.Sequential:
    """Three classes from six features: the centres of the world, plus a little noise in the weights."""
    stream = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        layers[0].weight.copy_(
            torch.cat([torch.eye(6), -torch.ones(2, 6)]) + 0.05 * torch.randn(8, 6, generator=stream)
        )
        layers[0].bias.zero_()
        layers[2].weight.copy_(torch.eye(3, 8) + 0.05 * torch.randn(3, 8, generator=stream))
        layers[2].bias.zero_()
    return layers.eval()


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clean rows (n, 6) around the class centres, with labels."""
    stream = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=stream)
    return CENTRES[y] + torch.randn(n, 6, generator=stream), y


def strange(n: int) -> Tensor:
    """Rows far from every class, inside the range of the clean ones."""
    x = torch.zeros(n, 6)
    x[:, 3:] = 5.0 + 0.01 * torch.arange(n)[:, None]
    return x


@dataclasses.dataclass
class Answer:
    allowed: Any
    reason: str = "because"


class Recorder:
    """All four collaborators in one; `calls` keeps the order, `fails` names the method that raises."""

    def __init__(self, *, fails: str = "", allowed: Any = True, capacity: float = 1e9) -> None:
        self.calls: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.observed: list[dict[str, Any]] = []
        self.fails, self.allowed, self.capacity = fails, allowed, capacity
        self.reserved: dict[int, float] = {}
        self.spent = 0.0

    def _step(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError("secret detail")

    def authorize(self, principal: str, action: str, resource: str) -> Answer:
        self._step("authorize")
        self.request = (principal, action, resource)
        return Answer(self.allowed)

    def reserve(self, principal: str, cost: float) -> int:
        self._step("reserve")
        if self.spent + sum(self.reserved.values()) + cost > self.capacity:
            raise BudgetExceeded("nothing left")
        self.reserved[len(self.calls)] = cost
        return len(self.calls)

    def commit(self, reservation: int) -> None:
        self._step("commit")
        self.spent += self.reserved.pop(reservation)

    def refund(self, reservation: int) -> None:
        self._step("refund")
        self.reserved.pop(reservation)

    def append(self, event: Mapping[str, Any]) -> int:
        self._step("append")
        self.events.append(dict(event))
        return len(self.events)

    def observe(self, *, verdict: str, reason: str, rows: int, seconds: float, p_values: Sequence[float] = ()) -> None:
        self._step("observe")
        self.observed.append({"verdict": verdict, "reason": reason, "rows": rows, "p_values": list(p_values)})

    def all(self) -> dict[str, Any]:
        return {"policy": self, "budget": self, "log": self, "metrics": self}
