"""Users as the unit of privacy: one clipped gradient for all rows of a user, whatever they are."""

import copy

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, PrivacyError
from aidefend.privacy import PrivacyLedger, clipping, make_private
from tests.privacy.private_worlds import cross_entropy, images, released, rows, settings, small_cnn, two_forwards

BOUND = 0.7
USERS = torch.tensor([0] * 6 + [1] + [2] * 3 + [3] * 5 + [4] * 2 + [5] * 7)  # 24 rows of 6 users


def user_settings(**changes):
    base = {"unit": "user", "max_rows_per_user": 7, "expected_batch_size": 6, "public_size": 6, "delta": 1e-2}
    return settings(**{**base, "insecure_seed": 3, "insecure_no_noise": True, **changes})


def run(model, data, users, config, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return make_private(model, optimizer, data, cross_entropy, config, users=users, **options)


def stepped(private, objective=None):
    x, y = next(iter(private.loader))
    private.optimizer.zero_grad()
    losses = cross_entropy(private.model(x), y) if objective is None else objective(private.model, x, y)
    private.backward(losses)
    private.optimizer.step()
    return x, y


def naive(model, x, y, users, objective=None):
    """Sum over users of the clipped gradient of the mean loss of their rows."""
    objective = objective or (lambda net, a, b: cross_entropy(net(a), b))
    twin = copy.deepcopy(model)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for user in users.unique():
        mine = users == user
        gradients = torch.autograd.grad(objective(twin, x[mine], y[mine]).mean(), list(parameters.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient * min(1.0, BOUND / float(norm))
    return total


class Words(nn.Module):
    """Embedding, attention, recurrence: the other forms of per-example gradients."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.read, self.head = nn.LayerNorm(4), nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        seen = self.words(x)
        seen = self.norm(seen + self.mix(seen, seen, seen, need_weights=False)[0])
        return self.head(self.read(seen)[1][0])


def words(n=24):
    stream = torch.Generator().manual_seed(2)
    return torch.randint(0, 9, (n, 5), generator=stream), torch.randint(0, 3, (n,), generator=stream)


@pytest.mark.parametrize("objective", [None, two_forwards])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_sum_is_that_of_one_gradient_for_each_user(objective, shuffled):
    data, users = images(), USERS
    if shuffled:
        users = USERS[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    model = small_cnn()
    private = run(model, data, users, user_settings())
    stepped(private, objective)
    expected = naive(model, *data, users, objective)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 6, expected[name], rtol=1e-3, atol=1e-5)


def test_other_layers_and_names_of_users():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words()
    data, names = words(), [f"user {int(user)}" for user in USERS]
    private = run(model, data, names, user_settings())
    stepped(private)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 6, naive(model, *data, USERS)[name], rtol=1e-3, atol=1e-5)


def move(data, users, other, other_users, **changes):
    """How far the sum moves between two data sets, in units of the bound."""
    model, found = small_cnn(), []
    for each, owners in ((data, users), (other, other_users)):
        private = run(copy.deepcopy(model), each, owners, user_settings(max_grad_norm=0.3, **changes))
        stepped(private)
        found.append(torch.cat([g.flatten() for g in released(private).values()]) * 6)
    return float((found[0] - found[1]).norm()) / 0.3


@pytest.mark.parametrize("outlier", [1.0, 1e4, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["flat", "per_layer", "automatic", "adaptive"])
def test_one_user_more_moves_the_sum_by_the_clip_norm(outlier, kind):
    x, y = images()
    x[20] *= outlier  # a row of user 5, who has seven
    others = USERS != 5
    assert move((x, y), USERS, (x[others], y[others]), USERS[others], clipping=kind) <= 1 + 1e-4


def test_one_user_exchanged_moves_it_by_twice_the_clip_norm():
    x, y = images()
    changed, mine = x.clone(), USERS == 5
    changed[mine] *= -1e3
    found = move(
        (x, y), USERS, (changed, (y + mine.long()) % 3), USERS, neighboring="replace_one", sampling="fixed_size"
    )
    assert 0.3 < found <= 2 + 1e-4


def test_planted_clipping_of_rows_in_place_of_users(monkeypatch):
    """Row by row a user with seven rows moves the sum by up to seven bounds."""
    monkeypatch.setattr(clipping, "calls_by_unit", lambda calls, units: calls)
    x, y = images()
    x[17:] = x[17:18] * 50
    y[17:] = y[17]
    others = USERS != 5
    assert move((x, y), USERS, (x[others], y[others]), USERS[others]) > 4


def test_a_user_with_a_broken_row_is_masked_whole():
    x, y = images()
    x[8] = torch.nan  # of user 2
    model = small_cnn()
    private = run(model, (x, y), USERS, user_settings())
    stepped(private)
    rest = USERS != 2
    expected = naive(model, x[rest], y[rest], USERS[rest])
    assert private.masked_rows == 1
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 6, expected[name], rtol=1e-3, atol=1e-5)


class Direction(nn.Module):
    """A layer that is not defined at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.weight * x / x.norm(dim=1, keepdim=True)


def test_the_rows_of_one_user_do_not_show_in_those_of_others():
    """Planted before: places that a user lacks were filled with zeros, at which this layer is no number."""
    x, y = rows()
    single = torch.arange(24)
    double = single.clone()
    double[23] = 22
    found = []
    for users in (double, single[:23]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(Direction(), nn.Linear(6, 3))
        config = user_settings(expected_batch_size=24, public_size=24)
        private = run(model, (x[: len(users)], y[: len(users)]), users, config)
        stepped(private)
        assert private.masked_rows == 0
        found.append(torch.cat([g.flatten() for g in released(private).values()]) * 24)
    assert 0 < float((found[0] - found[1]).norm()) <= 2 * BOUND


def test_users_join_together_and_with_so_many_rows_at_most():
    """120 steps of seeded draws: all or none of a user's places, two rows at most, each row in its turn."""
    x = torch.arange(24.0).reshape(24, 1)
    config = user_settings(expected_batch_size=3, steps=120, max_rows_per_user=2)
    private = run(nn.Linear(1, 3), (x, rows()[1]), USERS, config)
    joined, seen = torch.zeros(6), set()
    for batch, _ in private.loader:
        drawn = batch[:, 0].long().tolist()
        seen |= set(drawn)
        owners = USERS[drawn]
        for user in owners.unique():
            most = min(2, int((user == USERS).sum()))
            assert int((owners == user).sum()) == most
            joined[user] += 1
    assert seen == set(range(24))
    assert bool(((joined - 60).abs() < 6 * (120 * 0.25) ** 0.5).all())


def test_the_statement_and_the_ledger_know_the_unit(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-2)
    private = run(
        small_cnn(), images(), USERS, user_settings(insecure_seed=None, insecure_no_noise=False), ledger=ledger
    )
    stepped(private)
    text = private.statement().to_markdown()
    assert "all rows of one user" in text and "several users" in text and "several rows" not in text
    assert private.epsilon() <= ledger.epsilon() < float("inf")
    private.release()
    with pytest.raises(PrivacyError, match="unit"):
        ledger.open_run(settings())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_rows_per_user": None}, "max_rows_per_user"),
        ({"unit": "example"}, "max_rows_per_user"),
        ({"max_rows_per_user": 0}, "max_rows_per_user"),
        ({"microbatch": 4}, "microbatch"),
        ({"unit": "household"}, "unit"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, name):
    with pytest.raises(ConfigurationError, match=name):
        user_settings(**changes)


@pytest.mark.parametrize("users", [None, USERS[:5], USERS.reshape(6, 4), [object()] * 24])
def test_users_that_do_not_fit_are_refused(users):
    with pytest.raises(PrivacyError, match="users"):
        run(small_cnn(), images(), users, user_settings())


def test_a_set_up_that_is_refused_leaves_no_run_in_the_ledger(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger")
    with pytest.raises(PrivacyError, match="users"):
        run(small_cnn(), images(), USERS[:5], user_settings(), ledger=ledger)
    assert ledger.runs() == ()


def test_users_without_the_unit_are_refused():
    with pytest.raises(PrivacyError, match="unit"):
        run(small_cnn(), images(), USERS, settings())


def test_planted_rows_of_a_user_told_apart_by_the_epsilon_of_rows():
    """The same noise hides a user only where the user is the unit: with rows as units seven bounds show."""
    x, y = images()
    x[17:] = x[17:18] * 50
    y[17:] = y[17]
    model, others = small_cnn(), USERS != 5
    found = []
    for keep in (torch.ones(24, dtype=torch.bool), others):
        config = settings(expected_batch_size=24, public_size=24, insecure_seed=3, insecure_no_noise=True)
        optimizer_model = copy.deepcopy(model)
        private = make_private(
            optimizer_model,
            torch.optim.SGD(optimizer_model.parameters(), 0.0),
            (x[keep], y[keep]),
            cross_entropy,
            config,
        )
        stepped(private)
        found.append(torch.cat([g.flatten() for g in released(private).values()]) * 24)
    assert float((found[0] - found[1]).norm()) > 4 * BOUND
