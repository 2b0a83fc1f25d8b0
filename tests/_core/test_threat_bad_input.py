"""Every method of a threat names what it cannot use."""

import pytest
import torch

from aidefend import AidefendError, Threat

X = torch.full((2, 3), 0.5)
STRANGE = [None, "x", 3, [0.5], torch.ones(2, 3, dtype=torch.int64), torch.tensor(0.5), torch.ones(2, 3).to_sparse()]


@pytest.mark.parametrize("value", STRANGE, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_that_are_none(norm, value):
    threat = Threat(norm, 0.1)
    calls = [lambda: threat.random_start(value)]
    for method in (threat.project, threat.distance, threat.contains):
        calls += [lambda method=method: method(value, X), lambda method=method: method(X, value)]
    for call in calls:
        with pytest.raises(AidefendError, match="x"):
            call()


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (2, 3, 1), (6,)])
def test_points_of_another_shape(shape):
    threat = Threat("l2", 0.1)
    for method in (threat.project, threat.distance, threat.contains):
        with pytest.raises(AidefendError, match="x_adv of the shape of x"):
            method(torch.ones(shape), X)


@pytest.mark.parametrize(
    "bounds",
    [
        None,
        (0,),
        ("0", "1"),
        (None, 1.0),
        (True, 2.0),
        (torch.zeros(2), torch.ones(3)),
        (0.0, torch.ones(2).to_sparse()),
    ],
    ids=str,
)
def test_bounds_that_are_none(bounds):
    with pytest.raises(AidefendError, match="bounds"):
        Threat("linf", 0.1, bounds)


@pytest.mark.parametrize(
    "eps", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), 1j, torch.tensor(1j)], ids=str
)
def test_radii_that_are_none(eps):
    with pytest.raises(AidefendError, match="eps"):
        Threat("linf", eps)
