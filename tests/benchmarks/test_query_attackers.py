"""The adaptive attackers of the query benchmark do what their figures claim: oracles, widths, sets that double."""

import dataclasses

import pytest
import torch

from aidefend import Threat
from aidefend.validate import QueryMonitor
from benchmarks.query_attackers import drawn, jacobian_augmented
from benchmarks.query_attackers_oars import OARS, Trying
from tests.validate.query_world import days, model, probes

ANYWHERE = Threat("l2", 1e3)


@dataclasses.dataclass
class Standing:
    flagged: bool


class Touchy:
    """Flags an account whose query lies closer than 3 to its last one; a query that was only tried leaves nothing."""

    def __init__(self, store):
        self.store, self.last = store, {}

    def watch(self, name, x, outputs):
        flagged = name in self.last and float((x - self.last[name]).norm()) < 3
        if not self.store.dry:
            self.last[name] = x
        return Standing(flagged)


def steps(account, x, y, stream):
    """50 proposals of length 1 around x, to and fro."""
    for i in range(50):
        drawn(account, lambda stretch, i=i: x + (-1) ** i * stretch / 2 * torch.eye(len(x[0]))[:1])


def one(x):
    """A model with one class."""
    return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)


def test_accounts_find_the_narrowest_width_that_is_not_flagged():
    x, y = torch.zeros(1, 4), torch.tensor(0)
    found = OARS(steps, ANYWHERE, 100).by_accounts(Touchy, one, x, y, (x, y), 0)
    assert 3.0 <= found.stretch < 3.4 and not found.flagged and found.queries == 50 and found.accounts == 7


def test_a_flag_bit_is_never_run_into():
    x, y = torch.zeros(1, 4), torch.tensor(0)
    found = OARS(steps, ANYWHERE, 100).by_flag_bit(Touchy, one, x, y, 0)
    assert not found.flagged and not found.stalled and found.queries == 50
    blind = OARS(lambda account, x, y, stream: account(x) is account(x), ANYWHERE, 100)
    assert blind.by_flag_bit(Touchy, one, x, y, 0).flagged  # what is not drawn is not asked about before


def test_what_is_tried_leaves_nothing_in_the_store():
    store = Trying()
    monitor = QueryMonitor.calibrate(days(45), store, alpha=0.05, key=b"k" * 16, clock=lambda: 1.0)
    x = probes(100)
    store.dry = True
    assert monitor.watch("eve", x, model(x)).flagged
    store.dry = False
    assert store.health().principals == store.health().shared == 0 and not monitor.standing("eve").flagged


@pytest.mark.parametrize("queries", [8, 20, 33])
def test_a_set_doubles_along_the_signs_of_the_copy(queries):
    stream = torch.Generator().manual_seed(0)
    seeds = torch.rand(5, 12, generator=stream)
    student = torch.nn.Linear(12, 3)
    asked = jacobian_augmented(model, seeds, student, queries, 0.1, stream)
    assert len(asked) == queries and torch.equal(asked[:5], seeds)
    parents = asked[: len(asked[5:10])]
    assert float((asked[5:10] - parents).abs().max()) <= 0.1 + 1e-6 and not torch.equal(asked[5:10], parents)
