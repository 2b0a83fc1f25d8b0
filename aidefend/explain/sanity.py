"""Does an attribution depend on the model at all? Randomise its weights and see whether the picture changes."""

import copy
import dataclasses

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from aidefend._core.checks import check_kind, check_number, check_tensor, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.random import make_generator, normal
from aidefend.explain.attribution import Method, attribute


@dataclasses.dataclass(frozen=True)
class SanityCheck:
    """How similar attributions stay while weights are randomised from the output down.

    Args:
        layers: Names of the randomised modules, output first; entry i has all layers up to i randomised.
        similarity: Mean absolute Spearman rank correlation with the attributions of the trained model, in [0, 1].
        limit: Largest similarity at full randomisation that passes.
    """

    layers: tuple[str, ...]
    similarity: tuple[float, ...]
    limit: float

    @property
    def passed(self) -> bool:
        """The attributions changed with the model. Necessary for a faithful method, never sufficient."""
        return self.similarity[-1] <= self.limit

    def to_evidence(self) -> Evidence:
        """One finding: the similarity at full randomisation."""
        finding = Finding(
            id="explain.randomisation_similarity",
            title="Similarity of attributions after randomising all weights",
            severity=Severity.INFO if self.passed else Severity.MEDIUM,
            value=self.similarity[-1],
            n=len(self.layers),
            setting={"limit": self.limit, "layers": self.layers, "similarity": self.similarity},
            limits="A method that passes depends on the weights; that does not make it faithful.",
        )
        return Evidence([finding])


def sanity_check(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int,
    method: Method = "integrated_gradients",
    *,
    limit: float = 0.5,
    seed: int = 0,
) -> SanityCheck:
    """Compare attributions of the model with those of copies whose layers are randomised one after the other.

    Args:
        model: The module; it is copied, never changed.
        x: (N, ...) float, N >= 1; 10 to 50 rows suffice.
        target: Class of each sample, as for `attribute`.
        method: The attribution method under test.
        limit: Largest similarity that passes, in (0, 1).
        seed: For the random weights.
    Returns: The similarity after each layer.
    Raises: ConfigurationError: no parameters, empty x.
    Cost: One attribution of x for each layer with parameters, and one more.
    Source: Adebayo et al. 2018 (cascading randomisation). Weights are drawn normal with the spread of the layer's own.
    Example:
        >>> check = sanity_check(
        ...     nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)), torch.ones(8, 20), 0
        ... )
        >>> check.layers, len(check.similarity)
        (('2', '0'), 2)
    """
    check_tensor(x, "x", floating=True)
    check_number(limit, "limit", 0.0, 1.0, open_low=True, open_high=True)
    check_kind(model, nn.Module, "model", "Pass the trained module")
    copied = copy.deepcopy(model).eval()
    layers = [(name, module) for name, module in copied.named_modules() if list(module.parameters(recurse=False))]
    if not layers or len(x) == 0:
        found = f"{len(layers)} layers with parameters, {len(x)} rows"
        raise refuse("a model with parameters and at least one row", "model", found, "Pass a trained module and data")
    stream = make_generator(seed=seed)
    original = attribute(model, x, target, method, generator=make_generator(seed=seed)).values
    similarity = []
    for _, module in reversed(layers):
        _randomise(module, stream)
        changed = attribute(copied, x, target, method, generator=make_generator(seed=seed)).values
        similarity.append(_similarity(original, changed))
    return SanityCheck(tuple(name for name, _ in reversed(layers)), tuple(similarity), limit)


def _randomise(module: nn.Module, stream: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            spread = parameter.float().std() if parameter.numel() > 1 else parameter.float().abs().max()
            parameter.copy_(normal(tuple(parameter.shape), stream, parameter) * spread.to(parameter))


def _similarity(left: Tensor, right: Tensor) -> float:
    """Mean absolute rank correlation over samples; a constant map has none (0), two equal ones are identical (1)."""
    total = 0.0
    for one, other in zip(left.flatten(1).double().cpu(), right.flatten(1).double().cpu(), strict=True):
        if bool((one == one[0]).all()) or bool((other == other[0]).all()):
            total += float(torch.equal(one, other))
        else:
            total += abs(float(spearmanr(one.abs().numpy(), other.abs().numpy()).statistic))
    return total / len(left)
