"""Sharpness-aware tuning (FT-SAM): steps that look for flat minima, in which a backdoor's few weights shrink."""

import torch
from torch import Tensor, nn

from aidefend.sanitize.repair.tuning import TrustedRows, plain_loss, tuned


def sharpness_tuned(
    model: nn.Module, rows: TrustedRows, *, radius: float, rate: float, epochs: int, seed: int
) -> nn.Module:
    """A copy of the model, tuned with the gradient at the worst point near by, weight by weight in units of its size.

    The neighbourhood has this `radius` in these units.

    Cost: two passes forward and backward a step.
    Source: Zhu, Wei, Shen, Fan, Wu 2023 (fine-tuning with the adaptive sharpness-aware step of Kwon, Kim, Park, Choi
        2021).
    """

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        parameters = [p for p in net.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(plain_loss(net, x, y), parameters, allow_unused=True)
        with torch.no_grad():
            scaled = [None if s is None else p.abs() * s for p, s in zip(parameters, slopes, strict=True)]
            length = torch.stack([s.square().sum() for s in scaled if s is not None]).sum().sqrt().clamp(min=1e-12)
            kept = [p.detach().clone() for p in parameters]
            for parameter, slope in zip(parameters, scaled, strict=True):
                if slope is not None:
                    parameter.add_(parameter.abs() * slope, alpha=float(radius / length))
        worst = plain_loss(net, x, y)
        gradients = torch.autograd.grad(worst, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)
        terms = [(p * g).sum() for p, g in zip(parameters, gradients, strict=True) if g is not None]
        return torch.stack(terms).sum()  # its gradient is the one at the worst point

    return tuned(model, rows, rate=rate, epochs=epochs, seed=seed, loss=loss)
