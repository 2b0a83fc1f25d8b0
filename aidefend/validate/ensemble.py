"""Several detectors as one, joined through their p-values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_choice, check_int, check_kind, check_number, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.stats import combine_p_values, conformal_p_values
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.detector import (
    Detector,
    FittedDetector,
    FittedInputDetector,
    Rows,
    check_fit,
    is_detector,
    score_columns,
    unique_names,
)
from aidefend.validate.features import healthy_rows
from aidefend.validate.local_dimension import LocalDimension
from aidefend.validate.logit_scores import Energy
from aidefend.validate.mahalanobis import Mahalanobis, RelativeMahalanobis
from aidefend.validate.nearest_neighbours import NearestNeighbours
from aidefend.validate.odds import Odds
from aidefend.validate.stored import SINGLE, describe_detector, detector_arrays, rebuild_detector, with_prefix
from aidefend.validate.tail_surprise import Tails, rounding_of

Method = Literal["geometric", "harmonic", "bonferroni"]
Asked = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_METHODS = ("geometric", "harmonic", "bonferroni")
_LEAST_REFERENCE = 20
_MOST_REFERENCE = 2000
_DEFAULT = (Energy(), Mahalanobis(), RelativeMahalanobis(), NearestNeighbours(k=50), LocalDimension())


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """One detector out of several, joined through their p-values.

    A part of the rows given to `fit` is held back from the members; on it, each member's score becomes a surprise,
    -log P(score >= s), with an exponential tail. "geometric" adds the surprises (the mean of the log p-values: best
    where several members see a little), "harmonic" takes their log-sum-exp, "bonferroni" the largest (best where one
    member alone sees). As a surprise has no upper end, a member that sees nothing never hides one that does.
    With `shifts`, the rows held back are shifted in input space and put through the model; for each kind of shift a
    logistic regression on the members' standard scores, with positive weights, tells the shifted rows from the clean
    ones, and the joint score is the sum over the kinds of -log P(clean): the members count by what they saw. No strange
    row of the user's is needed; what resembles no shift is still found, though not as well as what resembles one.
    Guarantee: the score promises no rate by itself: calibrate it on other rows, with `Calibration` or in a `Guard`,
        and the rate of the joint decision is exact whatever the dependence of the members. `p_values` of the fitted
        ensemble holds under every dependence too, for rows exchangeable with the rows held back, but is loose.
    Args:
        detectors: Two or more configurations, ensembles too. The default looks at the logits, at the features in all
            directions and in those that tell classes apart, and at the neighbourhood: no shift is seen by all of them.
        method: "geometric", "harmonic" or "bonferroni"; how the members are joined; with `shifts`, in `p_values` alone.
        shifts: From inputs (M, ...) to shifted inputs by kind, such as `Shifts()`; the model is asked about each kind
            once. None = the members count alike.
        reference: Share of the rows that is held back, in (0, 1); at least 20 rows, at most 2,000.
        seed: Of the choice of these rows.
    Cost: The members'; nothing more of note. With `shifts`, the fit takes a pass for each kind and row held back.
    Source: Fisher 1925; Wilson 2019; Vovk, Wang 2020 (means of p-values under dependence).
    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> fitted = Ensemble([Energy(), NearestNeighbours(k=5)]).fit(x, x)
        >>> fitted.score(x[:4], x[:4]).shape
        torch.Size([4])
        >>> sorted(fitted.p_values(x[:4], x[:4]))
        ['combined', 'energy', 'nearest-neighbours']
    """

    detectors: Sequence[Detector] = _DEFAULT
    method: Method = "geometric"
    reference: float = 0.2
    seed: int = 0
    shifts: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        given = self.detectors
        if not isinstance(given, list | tuple) or len(given) < 2 or not all(map(is_detector, given)):
            raise refuse("two or more detectors", "detectors", given, "Pass for example [Energy(), ViM()]")
        object.__setattr__(self, "detectors", tuple(given))
        check_choice(self.method, _METHODS, "method")
        check_number(self.reference, "reference", 0.0, 1.0, open_low=True, open_high=True)
        check_int(self.seed, "seed", 0)
        if self.shifts is not None and not callable(self.shifts):
            raise refuse("shifts to be callable", "shifts", self.shifts, "Pass Shifts(), or None")

    def fit(
        self,
        features: Tensor,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        x: Tensor | None = None,
        model: Model | None = None,
        outputs: Asked | None = None,
    ) -> "FittedEnsemble":
        """Fit the members on one part of the rows, and put their scores on one scale with the other.

        Args:
            features: (N, d), N >= 40.
            logits: (N, K), or None for a regression model.
            labels: (N,) class indices, or None.
            x: (N, ...) the inputs, where a member looks at them or `shifts` is given.
            model: The model, where a member asks it.
            outputs: From inputs (M, ...) to features (M, d) and logits (M, K) or None, where `shifts` is given; a
                `Guard` passes its own.
        """
        check_fit(features, logits, labels)
        part, held = self._split(len(features))

        def of(values: Tensor | None, index: Tensor) -> Tensor | None:
            return None if values is None else values[index.to(values.device)]

        given = Rows(features[part.to(features.device)], of(logits, part), of(x, part), model)
        fitted = tuple(fit_detector(one, given, of(labels, part), outputs) for one in self.detectors)
        with torch.no_grad():
            rows = Rows(features[held.to(features.device)], of(logits, held), of(x, held), model)
            reference = score_columns(fitted, rows)
            odds = None if self.shifts is None else Odds.of(reference, self._shifted_scores(fitted, rows, outputs))
        return FittedEnsemble(fitted, reference, self.method, odds)

    def _shifted_scores(self, fitted: Sequence[FittedDetector], rows: Rows, outputs: Asked | None) -> dict[str, Tensor]:
        """The members' scores (m, D) of each kind of shifted rows; of those for which the model gives numbers."""
        if rows.x is None or outputs is None or self.shifts is None:
            rule = "x and outputs beside shifts: the model must be asked about shifted inputs"
            raise refuse(rule, "x, outputs", None, "Pass both, calibrate a Guard (which has them), or leave shifts out")
        found = {}
        cure = "Return a dict from kind to shifted inputs, as Shifts() does"
        for kind, x in check_kind(self.shifts(rows.x), Mapping, "shifts(x)", cure).items():
            features, logits = outputs(check_tensor(x, f"shifts(x)[{kind!r}]", finite=False))
            good = healthy_rows(features, features if logits is None else logits)
            if int(good.sum()) >= _LEAST_REFERENCE:
                kept = Rows(features[good], None if logits is None else logits[good], x[good], rows.model)
                found[kind] = score_columns(fitted, kept)
        if not found:
            cure = "Pass shifts that the model can read, or None"
            raise refuse(f"a kind with {_LEAST_REFERENCE} rows of finite outputs", "shifts", self.shifts, cure)
        return found

    def _split(self, n: int) -> tuple[Tensor, Tensor]:
        """Rows for the members and rows held back."""
        held = min(_MOST_REFERENCE, max(_LEAST_REFERENCE, round(self.reference * n)))
        if n < 2 * _LEAST_REFERENCE or held >= n:
            rule = f"at least {2 * _LEAST_REFERENCE} rows, of which {held} are held back to scale the scores"
            raise refuse(rule, "features", f"{n} rows", "Fit on more rows")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        return order[held:].sort().values, order[:held].sort().values


def fit_detector(detector: Detector, rows: Rows, labels: Tensor | None, outputs: Asked | None = None) -> FittedDetector:
    """Fit any detector on clean rows: gives each what it looks at."""
    if isinstance(detector, Ensemble):
        return detector.fit(rows.features, rows.logits, labels, x=rows.x, model=rows.model, outputs=outputs)
    return detector.fit(rows.features, rows.logits, labels)


class FittedEnsemble(nn.Module):
    """Fitted members and their scores (m, D) of the rows held back; see `Ensemble`.

    Args:
        members: What their `fit` returned.
        reference: (m, D).
        method: See `Ensemble`.
        odds: What the shifts taught, where there were any.
    """

    name: ClassVar[str] = "ensemble"

    def __init__(
        self,
        members: Sequence[FittedDetector | FittedInputDetector],
        reference: Tensor,
        method: str = "geometric",
        odds: Odds | None = None,
    ) -> None:
        super().__init__()
        check_tensor(reference, "reference", ndim=2, floating=True)
        if reference.shape[1] != len(members) or len(reference) < _LEAST_REFERENCE:
            rule = f"at least {_LEAST_REFERENCE} rows of {len(members)} scores"
            raise refuse(rule, "reference", reference, "Use what fit returned")
        self.members = tuple(members)
        self.method: str = check_choice(method, _METHODS, "method")
        for i, member in enumerate(self.members):
            if isinstance(member, nn.Module):
                self.add_module(f"member_{i}", member)
        self.register_buffer("reference", reference.double())
        for name, array in Tails.of(reference)._asdict().items():
            self.register_buffer(name, array, persistent=False)
        known = None if odds is None else odds.checked(len(self.members))
        for name in Odds._fields:
            self.register_buffer(name, None if known is None else getattr(known, name).double())

    @classmethod
    def rebuild(
        cls, given: Autoencoders, members: list[list[Any]], method: str, reference: Tensor, **arrays: Tensor
    ) -> "FittedEnsemble":
        """The ensemble back from its `settings` and `arrays`."""
        parts = [
            rebuild_detector(described, with_prefix(arrays, f"{i}/"), KINDS, given)
            for i, described in enumerate(members)
        ]
        odds = Odds(*(arrays[name] for name in Odds._fields)) if "weights" in arrays else None
        return cls(parts, reference, method, odds)

    @property
    def uses_features(self) -> bool:
        """Whether any member looks at the features."""
        return any(getattr(member, "uses_features", True) for member in self.members)

    @property
    def uses_inputs(self) -> bool:
        """Whether any member looks at the inputs or asks the model again."""
        return any(getattr(member, "uses_inputs", False) for member in self.members)

    @property
    def _odds(self) -> Odds | None:
        return None if self.weights is None else Odds(*(cast(Tensor, getattr(self, name)) for name in Odds._fields))

    @property
    def member_names(self) -> tuple[str, ...]:
        """Names of the members; the second of a kind gets "-2"."""
        return unique_names(self.members)

    def score(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> Tensor:
        """The joint surprise: (N,) float64, higher = stranger."""
        return self.join(score_columns(self.members, Rows(features, logits, x, model)))

    def join(self, scores: Tensor) -> Tensor:
        """The joint surprise of the members' scores (N, D): (N,) float64, never falling in any."""
        if self._odds is not None:
            return self._odds.surprise(scores)
        tails = Tails(*(cast(Tensor, getattr(self, name)) for name in Tails._fields))
        surprises = tails.surprises(scores)
        if self.method == "geometric":
            return surprises.clamp(min=0).sum(dim=1)
        return surprises.logsumexp(dim=1) if self.method == "harmonic" else surprises.amax(dim=1)

    def p_values(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> dict[str, Tensor]:
        """Conformal p-values of the members against the rows held back, and "combined": each (N,) float64.

        Guarantee: for a row that is exchangeable with those, P(p <= a) <= a for each, under every dependence; what ties
            but for rounding counts as a tie.
        """
        own = cast(Tensor, self.reference)
        scores = score_columns(self.members, Rows(features, logits, x, model)) - rounding_of(own)
        each = [conformal_p_values(scores[:, i], own[:, i]) for i in range(len(self.members))]
        joint = combine_p_values(torch.stack(each, dim=1), cast(Method, self.method))
        return {**dict(zip(self.member_names, each, strict=True)), "combined": joint}

    def settings(self) -> Mapping[str, Any]:
        """Kinds and settings of the members, and the method."""
        return {"members": [describe_detector(member, KINDS) for member in self.members], "method": self.method}

    def arrays(self) -> Mapping[str, Tensor]:
        """The reference scores and what the members learned."""
        found = {"reference": cast(Tensor, self.reference)}
        if self._odds is not None:
            found |= self._odds._asdict()
        for i, member in enumerate(self.members):
            found |= {f"{i}/{name}": array for name, array in detector_arrays(member).items()}
        return found


KINDS: dict[str, type[Any]] = SINGLE | {"FittedEnsemble": FittedEnsemble}
