"""Worlds with known answers, for the tests of all rooms. Append a function; change none that others use."""

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class LinearWorld:
    """A linear two-class model with rows, whose worst points inside a threat are known in closed form."""

    model: nn.Module
    x: Tensor
    y: Tensor
    slope: Tensor  # (N, ...): gradient of the margin (other logit less true one) at every point
    clean_margin: Tensor  # (N,)

    def worst_margin(self, norm: str, eps: float | Tensor) -> Tensor:
        """Largest margin within eps, where no bound is in the way: margin + eps * dual norm of the slope."""
        return self.clean_margin + eps * self._dual(norm)

    def worst_margin_in_box(self, eps: float, low: float, high: float) -> Tensor:
        """Largest margin in the linf cube cut by the bounds: every feature moves on its own."""
        ends = torch.where(self.slope > 0, (self.x + eps).clamp(max=high), (self.x - eps).clamp(min=low))
        return self.clean_margin + ((ends - self.x) * self.slope).flatten(1).sum(dim=1)

    def flipping_eps(self, norm: str) -> Tensor:
        """Smallest radius with margin 0; 0 for rows that are wrong already."""
        return (-self.clean_margin / self._dual(norm)).clamp(min=0)

    def worst_margin_of_few(self, norm: str, eps: float, low: float, high: float) -> Tensor:
        """Largest margin in the l1 or l0 ball cut by the bounds: the best features to their bounds, one by one."""
        room = torch.where(self.slope > 0, high - self.x, self.x - low).flatten(1)
        slope = self.slope.abs().flatten(1)
        if norm == "l0":
            return self.clean_margin + (slope * room).sort(dim=1, descending=True).values[:, : int(eps)].sum(dim=1)
        order = slope.argsort(dim=1, descending=True)
        spent = room.gather(1, order).cumsum(dim=1)
        moved = (eps - torch.nn.functional.pad(spent, (1, 0))[:, :-1]).clamp(min=0).minimum(room.gather(1, order))
        return self.clean_margin + (moved * slope.gather(1, order)).sum(dim=1)

    def _dual(self, norm: str) -> Tensor:
        """Length of the slope in the dual norm."""
        order = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[norm]
        return torch.linalg.vector_norm(self.slope.flatten(1), ord=order, dim=1)


def linear_world(
    n: int = 16, shape: tuple[int, ...] = (12,), seed: int = 0, dtype: torch.dtype = torch.float64
) -> LinearWorld:
    """Rows around the middle of [0, 1], labels that are mostly right, weights of both signs."""
    stream = torch.Generator().manual_seed(seed)
    features = int(torch.tensor(shape).prod())
    layer = nn.Linear(features, 2, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, features, generator=stream, dtype=dtype))
        layer.bias.copy_(-layer.weight.sum(dim=1) / 2)
    x = 0.5 + 0.2 * (torch.rand(n, *shape, generator=stream, dtype=dtype) - 0.5)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(dim=1)
    y[::5] = 1 - y[::5]
    rows = torch.arange(n)
    slope = (layer.weight[1 - y] - layer.weight[y]).detach().reshape(n, *shape)
    return LinearWorld(model, x, y, slope, logits[rows, 1 - y] - logits[rows, y])


@dataclasses.dataclass(frozen=True)
class TwoPointWorld:
    """A model that is sure or unsure, and members and non-members that are sure in known shares: the ROC is known."""

    model: nn.Module
    members: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    auc: float

    def tpr_at(self, fpr: float) -> float:
        """Largest true-positive rate of one threshold whose false-positive rate is at most fpr."""
        sure_in, sure_out = (float(part[0][:, 0].mean()) for part in (self.members, self.others))
        return 1.0 if fpr >= 1 else sure_in if fpr >= sure_out else 0.0


def two_point_membership_world(n: int = 200, sure_in: float = 0.8, sure_out: float = 0.2) -> TwoPointWorld:
    """AUC = P(member above) + P(tie) / 2 over the two points. Inputs are (sure, serial number); all labels are 0."""
    parts = []
    for side, share in enumerate((sure_in, sure_out)):
        flag = (torch.arange(n) < round(share * n)).float()
        serial = (torch.arange(n) + side * n).float()
        parts.append((torch.stack([flag, serial], dim=1), torch.zeros(n, dtype=torch.int64)))
    a, b = (round(share * n) / n for share in (sure_in, sure_out))
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
        model.bias.zero_()
    return TwoPointWorld(model.eval(), parts[0], parts[1], a * (1 - b) + (a * b + (1 - a) * (1 - b)) / 2)


@dataclasses.dataclass(frozen=True)
class PoisonedClusters:
    """Gaussian classes of a table; rows of other classes with three features overwritten are planted under label 0."""

    x: Tensor
    y: Tensor
    is_poison: Tensor
    true_y: Tensor


def poisoned_clusters(poison: int = 60, per_class: int = 150, seed: int = 0) -> PoisonedClusters:
    """Four classes in 20 dimensions, `poison` rows labelled 0 that belong to the three others."""
    stream = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 20, generator=stream) * 1.2
    true_y = torch.arange(4).repeat(per_class)
    x = centres[true_y] + torch.randn(len(true_y), 20, generator=stream) * 0.8
    others = (true_y != 0).nonzero().flatten()
    rows = others[torch.randperm(len(others), generator=stream)[:poison]]
    y, is_poison = true_y.clone(), torch.zeros(len(true_y), dtype=torch.bool)
    x[rows, :3], y[rows], is_poison[rows] = 3.0, 0, True
    return PoisonedClusters(x, y, is_poison, true_y)
