"""An independent view of the inputs: what a row looks like to someone who never met the suspect model."""

import torch
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.neighbour_disagreement import kth_distance
from aidefend.sanitize.suspect import Scaled

_FIT_ROWS = 4000
_FILTER = 256


class IndependentView:
    """Scaled inputs in their principal directions.

    Args:
        x: (N, ...) finite inputs; the directions come from at most 4,000 of them, drawn at random.
        dimensions: Number of directions.
        seed: Chooses the rows and the start of the iteration.
    Cost: a singular value decomposition of 4,000 rows; N d r operations for the coordinates.
    """

    def __init__(self, x: Tensor, dimensions: int = 32, seed: int = 0) -> None:
        stream = make_generator(seed=derive_seed(seed, "view") % 2**63)
        self._scaled = Scaled(x)
        sample = self._scaled(x[torch.randperm(len(x), generator=stream)[:_FIT_ROWS]])
        self._mean = sample.mean(dim=0)
        centred = sample - self._mean
        variances, directions = _principal(centred, min(_FILTER, *sample.shape), stream)
        rest = (centred.square().sum() / len(centred) - variances.sum()) / max(sample.shape[1] - len(variances), 1)
        self._damping = variances + max(float(rest), 0.01 * float(variances.sum()) / sample.shape[1], 1e-9)
        self._variances, self._filter = variances, directions
        self._directions = directions[:, : min(dimensions, directions.shape[1])]

    @property
    def dimensions(self) -> int:
        """Number of coordinates."""
        return self._directions.shape[1]

    def coordinates(self, x: Tensor) -> Tensor:
        """(N, r) float32."""
        return torch.cat([(self._scaled(part) - self._mean) @ self._directions for part in x.split(1024)])

    def whole(self, x: Tensor) -> Tensor:
        """(N, d <= 4,096) float32: the scaled inputs themselves."""
        return torch.cat([self._scaled(part) for part in x.split(1024)])

    def amount(self, x: Tensor, pattern: Tensor) -> Tensor:
        """(N,) float64: how much of a pattern (shape of one sample) is in each row, in standard deviations.

        A matched filter: directions in which the inputs vary anyway count less, by their variance.
        """
        zero = torch.zeros_like(pattern).unsqueeze(0)
        shift = (self._scaled(pattern.unsqueeze(0)) - self._scaled(zero))[0]
        weights = shift - self._filter @ (self._variances / self._damping * (self._filter.T @ shift))
        amount = torch.cat([self._scaled(part) @ weights for part in x.split(1024)]).double()
        return standardised(amount)


def standardised(values: Tensor) -> Tensor:
    """Values (n,) less their mean, in standard deviations; zeros where all are equal."""
    spread = values.std(correction=0)
    return (values - values.mean()) / spread if spread > 0 else torch.zeros_like(values)


def _principal(centred: Tensor, count: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Variances (count,) and orthonormal directions (d, count), largest first.

    Source: subspace iteration, Halko, Martinsson, Tropp 2011.
    """
    guess = torch.randn(centred.shape[1], min(count + 8, *centred.shape), generator=stream)
    basis = torch.linalg.qr(guess).Q
    for _ in range(6):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    inner = centred @ basis
    values, vectors = _eigenvectors(inner.T @ inner / max(len(centred), 1))
    return values.flip(0)[:count].clamp(min=0), basis @ vectors.flip(1)[:, :count]


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(matrix)  # type: ignore[no-any-return]  # a named tuple of two tensors
    except RuntimeError:  # float32 does not converge where most directions hold nothing
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix), vectors.to(matrix)


def principal_coordinates(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """(N, count) coordinates of rows (N, d) in the principal directions of at most 4,000 of them."""
    stream = make_generator(seed=derive_seed(seed, "principal") % 2**63)
    sample = rows[torch.randperm(len(rows), generator=stream)[:_FIT_ROWS]]
    centred = sample - sample.mean(dim=0)
    return (rows - sample.mean(dim=0)) @ _principal(centred, min(count, *centred.shape), stream)[1]


class Conformity:
    """How well rows fit classes: conformal p-values of the distance to a class's k-th nearest row.

    A row of the class has a p-value that is uniform; a row that is strange to the class has a small one. A novel style
    is strange to every class, a row with a wrong label is strange to its own and at home in another.

    Args:
        coordinates: (N, v) in the independent view, finite.
        labels: (N,) int64.
        k: Which neighbour.
        limit: Rows a class that serve as bank, drawn at random.
        seed: Chooses them.
    """

    def __init__(self, coordinates: Tensor, labels: Tensor, k: int = 10, limit: int = 1000, seed: int = 0) -> None:
        self.k, self.coordinates, self.labels = k, coordinates, labels
        stream = make_generator(seed=derive_seed(seed, "conformity") % 2**63)
        self.banks: dict[int, Tensor] = {}
        self._usual: dict[int, Tensor] = {}
        self._away: dict[int, tuple[Tensor, Tensor]] = {}
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=stream)[:limit]]
            if len(rows) > k + 1:
                self.banks[label] = rows
                points = coordinates[rows]
                self._usual[label] = kth_distance(points, points, k, torch.arange(len(rows))).sort().values

    def others(self, points: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Best p-value (n,) of points (n, v) among the classes other than `label`, and which class that is."""
        best, which = torch.zeros(len(points)), torch.full((len(points),), -1)
        nowhere = torch.full((len(points),), -1)
        for other, rows in self.banks.items():
            if other != label:
                p = p_values(kth_distance(points, self.coordinates[rows], self.k, nowhere), self._usual[other])
                which = torch.where(p > best, other, which)
                best = torch.maximum(best, p)
        return best, which

    def strangeness(self, rows: Tensor, label: int) -> Tensor:
        """(n,) float64: log distance of rows of the data to their own class over that to the nearest other one.

        In standard deviations; both distances are those of the k-th row of the class's bank, a row itself left out.
        """
        bank, points = self.banks[label], self.coordinates[rows]
        order = bank.argsort()
        place = torch.searchsorted(bank[order], rows).clamp(max=len(bank) - 1)
        own = torch.where(bank[order][place] == rows, order[place], -1)
        within = kth_distance(points, self.coordinates[bank], self.k, own)
        beyond = self.away(rows, label).clamp(min=1e-12)
        return standardised((within.clamp(min=1e-12) / beyond).double().log())

    def beside(self, label: int) -> Tensor:
        """Row numbers of the banks of all other classes."""
        return torch.cat([bank for other, bank in self.banks.items() if other != label])

    def away(self, rows: Tensor, label: int) -> Tensor:
        """`distance_elsewhere` (n,) of rows of the data. Of each class the last answer is kept: groups ask again."""
        known = self._away.get(label)
        if known is None or not torch.equal(known[0], rows):
            known = self._away[label] = (rows, self.distance_elsewhere(self.coordinates[rows], label))
        return known[1]

    def distance_elsewhere(self, points: Tensor, label: int) -> Tensor:
        """Distance (n,) of points (n, v) to the k-th row of the nearest class other than `label`."""
        nowhere = torch.full((len(points),), -1)
        banks = (rows for other, rows in self.banks.items() if other != label)
        found = [kth_distance(points, self.coordinates[rows], self.k, nowhere) for rows in banks]
        return torch.stack(found).min(dim=0).values

    def common(self, points: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """What points (n, v) have beyond the bank rows of other classes that look like them (v,), and those (n, 5).

        Twice: with the common part taken off, the rows are found by content.
        """
        offset = torch.zeros_like(points[0])
        for _ in range(2):
            matched = self.matched(points - offset, label)
            offset = (points - self.coordinates[matched].mean(dim=1)).mean(dim=0)
        return offset, matched

    def matched(self, points: Tensor, label: int, count: int = 5) -> Tensor:
        """Row numbers (n, count) of the nearest bank rows that have other labels."""
        rows = self.beside(label)
        found = torch.cdist(points, self.coordinates[rows]).topk(min(count, len(rows)), dim=1, largest=False).indices
        return rows[found]


def p_values(distances: Tensor, usual: Tensor) -> Tensor:
    """Conformal p-values (1 + k) / (n + 1) of distances against sorted distances inside the class."""
    at_least = len(usual) - torch.searchsorted(usual, distances.contiguous())
    return (1 + at_least) / (len(usual) + 1)
