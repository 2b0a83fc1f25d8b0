"""One look at the losses that really train: do the remembered passes explain their gradient, row by row?"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aidefend.privacy.clipping import norms_squared, parts_of, weighted_sums
from aidefend.privacy.forward_pass import ForwardPass
from aidefend.privacy.recorder import Places, Recorder, tapped_calls
from aidefend.privacy.step_book import Ticket, refused


def verify_losses(
    recorder: Recorder, losses: Tensor, ticket: Ticket, trainable: Mapping[str, nn.Parameter], seed: int
) -> bool:
    """Refuse losses whose gradient is not the sum of what the rows of private.model explain.

    Two facts are checked: the gradient of every parameter comes from the layers' calls alone (no second path through a
    bare weight or a penalty), and a random sign on losses[i] turns the sign of row i and of no other row.

    Returns: Whether the batch was fit to tell; one with fewer than two rows or a non-finite value is not.
    Raises: PrivacyError: the gradient is not explained, or couples rows.
    Cost: Two backward passes, once in a run.
    """
    passes = recorder.passes(ticket)
    places = recorder.gradients(losses.sum(), passes, retain=True)
    given = [gradient for each in places for gradient in each if gradient is not None]
    if len(losses) < 2 or not given or not all(bool(torch.isfinite(gradient).all()) for gradient in given):
        return False
    if any(len(gradient) != len(losses) for gradient in given):
        return False
    _verify_signs(recorder, losses, passes, places, seed)
    return _verify_sum(recorder, losses, passes, places, trainable)


def _verify_signs(recorder: Recorder, losses: Tensor, passes: Sequence[ForwardPass], places: Places, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    signs = (2.0 * torch.randint(0, 2, (len(losses),), generator=stream) - 1).to(losses)
    signs[0] = -signs[1:].sign()[0]
    turned = recorder.gradients((signs * losses).sum(), passes, retain=True)
    for each, other in zip(places, turned, strict=True):
        for gradient, flipped in zip(each, other, strict=True):
            if gradient is None or flipped is None:
                continue
            expected = gradient * signs.reshape(-1, *[1] * (gradient.ndim - 1)).to(gradient)
            if _far(flipped, expected):
                cure = (
                    "Let losses[i] depend on row i of every pass alone: no mean, normalisation or mixing over the batch"
                )
                raise refused("losses of independent examples", "losses", losses, cure)


def _verify_sum(
    recorder: Recorder,
    losses: Tensor,
    passes: Sequence[ForwardPass],
    places: Places,
    trainable: Mapping[str, nn.Parameter],
) -> bool:
    plain = recorder.parameter_gradients(losses.sum(), list(trainable.values()))
    calls = tapped_calls(list(zip(passes, places, strict=True)))
    coarsest = max((torch.finfo(call.gradient.dtype).eps for each in calls.values() for call in each), default=0.0)
    ours: dict[str, Tensor] = {}
    if calls:
        parts = parts_of(calls, recorder.layers)
        ones = torch.ones_like(norms_squared(parts))
        ours = weighted_sums(parts, ones)
    floor = 1e-5 * max((float(gradient.abs().max()) for gradient in plain if gradient is not None), default=0.0)
    for name, gradient in zip(trainable, plain, strict=True):
        expected = torch.zeros_like(trainable[name]) if gradient is None else gradient
        found = ours.get(name, torch.zeros_like(expected))
        if bool(torch.isfinite(expected).all()) and _far(found, expected, floor, coarsest):
            cure = "Compute the losses from private.model(x) alone: no penalty on its weights, no second derivative"
            raise refused(f"the gradient of {name} to come from calls of private.model", "losses", losses, cure)
    return True


def _far(found: Tensor, expected: Tensor, floor: float = 0.0, coarsest: float = 0.0) -> bool:
    """Whether two gradients differ by more than rounding; `coarsest` is the precision of a 16-bit pass."""
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    tolerance = max(5e-3, 16 * coarsest, 16 * torch.finfo(expected.dtype).eps)
    return bool(((found.double() - expected.double()).abs() > tolerance * scale + floor + 1e-9).any())
