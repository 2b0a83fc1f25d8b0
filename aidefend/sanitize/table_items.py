"""The items of a table: values that a column takes again and again, and ranges of values."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from scipy import stats
from torch import Tensor

from aidefend.sanitize.items import Pattern, stacked
from aidefend.sanitize.view import principal_coordinates

FEWEST = 5
_BINS = 10
_WIDEST = 64


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: As the user knows it.
        cells: Numbers of the cells of a row that hold it: one for a number, one for each category.
        categories: Their names; empty for a number.
    """

    name: str
    cells: tuple[int, ...]
    categories: tuple[str, ...] = ()


def plain_columns(width: int) -> tuple[Column, ...]:
    """Columns of a table of numbers without names."""
    return tuple(Column(f"column {cell}", (cell,)) for cell in range(width))


class TableItems:
    """Values of columns as items (see `Items`): each value that occurs five times, tenths of a column, its ends.

    Args:
        x: (N, d) finite.
        columns: What the cells are.
        predict: Classes (n,) of rows (n, d).
    Cost: N log N comparisons a column.
    """

    def __init__(self, x: Tensor, columns: Sequence[Column], predict: Callable[[Tensor], Tensor]) -> None:
        self.x, self.columns, self.predict = x, tuple(columns), predict
        held, places, self._said = [], [], []
        for place, column in enumerate(self.columns):
            for said, rows in _values(x, column):
                held.append(rows)
                places.append(place)
                self._said.append(said)
        self.holds, self.places = stacked(held, len(x)), torch.tensor(places, dtype=torch.int64)
        self._normal = [_scores_of(x, column) for column in self.columns]

    def content(self, pattern: Pattern, labels: Tensor) -> Tensor:
        """(N, v) normal scores of all columns but those of the pattern: no value counts more than its rank."""
        gone = {int(self.places[item]) for item in pattern}
        kept = [scores for place, scores in enumerate(self._normal) if place not in gone]
        rows = torch.cat(kept, dim=1) if kept else torch.zeros(len(self.x), 1)
        return rows if rows.shape[1] <= _WIDEST else principal_coordinates(rows, _WIDEST)

    def classes_with(self, rows: Tensor, pattern: Pattern, donors: Tensor) -> Tensor:
        """Classes of rows whose columns of the pattern take the median, or commonest, value of the donors."""
        moved = self.x[rows].clone()
        for place in {int(self.places[item]) for item in pattern}:
            column = self.columns[place]
            cells = list(column.cells)
            ours = self.x[donors][:, cells]
            if column.categories:
                moved[:, cells] = torch.nn.functional.one_hot(ours.float().mean(dim=0).argmax(), len(cells)).to(moved)
            else:
                moved[:, cells] = ours.median(dim=0).values
        return self.predict(moved)

    def classes_of(self, rows: Tensor) -> Tensor:
        """Classes of rows as they are."""
        return self.predict(self.x[rows])

    def words(self, pattern: Pattern, donors: Tensor) -> str:
        """Such as "age = 40 and job = clerk"."""
        return " and ".join(self._said[item] for item in pattern)


def _values(x: Tensor, column: Column) -> list[tuple[str, Tensor]]:
    """Each item of a column in words, and the rows (N,) bool that hold it."""
    if column.categories:
        pairs = zip(column.categories, column.cells, strict=True)
        found = [(f"{column.name} = {category}", x[:, cell] == 1) for category, cell in pairs]
        return [(said, rows) for said, rows in found if int(rows.sum()) >= FEWEST]
    values = x[:, column.cells[0]].double()
    known, counts = values.unique(return_counts=True)
    often = known[counts >= FEWEST].tolist() if len(known) > 1 else []
    exact = [(f"{column.name} = {value:.6g}", values == value) for value in often]
    return exact + (_ranges(values, column.name) if len(known) > 2 * _BINS else [])


def _ranges(values: Tensor, name: str) -> list[tuple[str, Tensor]]:
    """Tenths of a column, and both ends of it: a hand that adds noise to what it writes stays within one."""
    shares = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
    edges = values.quantile(shares).unique().tolist()
    found = [
        (f"{name} from {low:.6g} to {high:.6g}", (values >= low) & (values <= high))
        for low, high in itertools.pairwise(edges)
    ]
    for share in (0.01, 0.03):
        low, high = (float(end) for end in values.quantile(torch.tensor([share, 1 - share], dtype=torch.float64)))
        found += [(f"{name} >= {high:.6g}", values >= high), (f"{name} <= {low:.6g}", values <= low)]
    return [(said, rows) for said, rows in found if FEWEST <= int(rows.sum()) < len(values)]


def _scores_of(x: Tensor, column: Column) -> Tensor:
    """(N, c) float32, mean 0: a number by its rank; all categories of a column together weigh as much as a number."""
    cells = x[:, list(column.cells)]
    if not column.categories:
        return _normal_scores(cells)
    centred = cells - cells.mean(dim=0)
    return (centred / centred.square().mean(dim=0).sum().sqrt().clamp(min=1e-6)).float()


def _normal_scores(cells: Tensor) -> Tensor:
    """(N, c) float32: each cell as the normal quantile of its rank, ties together, mean 0."""
    ranks = torch.from_numpy(stats.rankdata(cells.double().numpy(), axis=0))
    scores = torch.special.ndtri((ranks - 0.5) / max(len(cells), 1))
    centred: Tensor = (scores - scores.mean(dim=0)).float()
    return centred
