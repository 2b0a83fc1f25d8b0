"""Relearning: fresh weights learn the task from varied trusted rows, and of the old model as little as suffices."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, one_hot

from aidefend._core.checks import refuse
from aidefend._core.random import derive_seed, make_generator, own_stream
from aidefend.sanitize.repair.tuning import TrustedRows, copied, weighted_layers

_BATCH = 128
_STEPS = 50  # an epoch
_RATE = 3e-3
_TURN, _SCALE, _SHEAR, _SHIFT = 0.2, 0.12, 0.15, 0.12  # radians; shares; shares; of half the side
_BEND = 0.05  # of half the side, root mean square of what moves a control point
_CONTROLS = 5  # points of a bend along each side of an image
_PATTERN = 0.5  # of the range: the strongest pattern that is added
_TRUST = 0.5  # in the shares of a mixture, beside what the model says of it


def relearned(model: nn.Module, rows: TrustedRows, *, epochs: int, seed: int) -> Iterator[nn.Module]:
    """Copies of the model, strongest first, that learn varied trusted rows and mixtures of two of them.

    Rows are turned, scaled, moved and bent a little where they are images, half of them with a random pattern added and
    half with a random rectangle written into them: no such change means a class. The first copy has fresh weights in
    all layers and learns the labels and the shares of the mixtures alone, so nothing that the model's weights held is
    in it. The second also learns how the model divides a mixture (before any change) between the labels of its two
    rows; it may name no other class. The third has fresh weights in the later half of the layers only, the fourth in
    the last one.

    Raises: ConfigurationError: trusted rows without some class of the model: it would be forgotten.
    Source: ours; labels of a teacher after Hinton, Vinyals, Dean 2015, mixtures after Zhang, Cisse, Dauphin,
        Lopez-Paz 2018.
    """
    classes = _classes(model, rows)
    layers = weighted_layers(model, rows.x)
    names = {module: name for name, module in model.named_modules()}
    settings = [(0, 1.0), (0, _TRUST), (len(layers) // 2, _TRUST), (len(layers) - 1, _TRUST)]
    for first, trust in dict.fromkeys(settings):
        fresh = None if first == 0 else [names[layer] for layer in layers[first:]]
        start = renewed(model, fresh, derive_seed(seed, "fresh"))
        yield _taught(start, model, rows, classes, trust, epochs * _STEPS, seed)


def _classes(model: nn.Module, rows: TrustedRows) -> int:
    with torch.no_grad():
        classes = int(model(rows.x[:1]).shape[1])
    absent = sorted(set(range(classes)) - set(rows.y.tolist()))
    if absent:
        cure = 'Add at least two rows of each, or use method="trigger-unlearning"'
        raise refuse("trusted rows of every class that the model knows", "trusted", f"none of {absent[:5]}", cure)
    return classes


def renewed(model: nn.Module, names: list[str] | None, seed: int) -> nn.Module:
    """A copy with fresh weights in the named modules; None: everywhere.

    A module draws by its `reset_parameters`; entries of a parameter that none of these changes are put in a random
    order, which keeps their distribution and nothing else. Buffers stay, but for those that `reset_parameters` resets.
    """
    twin = copied(model)
    modules = list(twin.modules()) if names is None else [twin.get_submodule(name) for name in names]
    stream = make_generator(seed=derive_seed(seed, "order"))
    with own_stream(seed), torch.no_grad():
        before = {parameter: parameter.clone() for module in modules for parameter in module.parameters(recurse=False)}
        for module in modules:
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        for parameter, old in before.items():
            _shuffle_if_same(parameter, old, stream)
    return twin


def _shuffle_if_same(parameter: Tensor, before: Tensor, stream: torch.Generator) -> None:
    if torch.equal(parameter, before):
        order = torch.randperm(parameter.numel(), generator=stream).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


def _taught(
    student: nn.Module, teacher: nn.Module, rows: TrustedRows, classes: int, trust: float, steps: int, seed: int
) -> nn.Module:
    """The student after steps of Adam over varied rows and mixtures, half of a batch each; normalising layers learn."""
    stream = make_generator(seed=derive_seed(seed, "relearning"))
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    with torch.enable_grad(), own_stream(derive_seed(seed, "dropout")):
        for _ in range(steps):
            x, wanted = _lesson(teacher, rows, classes, trust, stream)
            optimizer.zero_grad()
            cross_entropy(student(x), wanted).backward()
            optimizer.step()
            schedule.step()
    return student.eval()


def _lesson(
    teacher: nn.Module, rows: TrustedRows, classes: int, trust: float, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of rows and mixtures, cluttered and varied, and the chances of the classes (n, K) to be learnt.

    The teacher sees the mixtures before that: bent or marked rows could wake what is to be forgotten.
    """
    chosen = torch.randint(len(rows.x), (_BATCH,), generator=stream).to(rows.x.device)
    x, truth = rows.x[chosen], one_hot(rows.y[chosen], classes).to(rows.x)
    half = _BATCH // 2
    other = torch.randperm(_BATCH, generator=stream)[:half].to(x.device)
    share = torch.rand(half, generator=stream).to(x)
    mixed = torch.lerp(x[:half], x[other], share.reshape(-1, *[1] * (x.ndim - 1)))
    wanted = torch.lerp(truth[:half], truth[other], share[:, None])
    if trust < 1:
        with torch.no_grad():
            said = divided(teacher(mixed), truth[:half] + truth[other] > 0)
        wanted = torch.lerp(said, wanted, trust)
    x = varied(torch.cat([x[half:], mixed]), stream)
    return cluttered(x, float(rows.x.amin()), float(rows.x.amax()), stream), torch.cat([truth[half:], wanted])


def divided(logits: Tensor, among: Tensor) -> Tensor:
    """Chances (n, K) when no class but those `among` (n, K) may be named; never NaN."""
    return logits.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4).masked_fill(~among, -torch.inf).softmax(dim=1)


def varied(x: Tensor, stream: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each turned, scaled, sheared, moved and bent a little; other rows as they are."""
    if x.ndim != 4:
        return x
    count = len(x)
    angle, wide, high, shear, right, down = (2 * torch.rand(6, count, generator=stream) - 1).unbind()
    angle, wide, high, shear = _TURN * angle, 1 + _SCALE * wide, 1 + _SCALE * high, _SHEAR * shear
    across = torch.stack([wide * angle.cos(), shear - high * angle.sin(), _SHIFT * right], dim=1)
    along = torch.stack([wide * angle.sin(), high * angle.cos(), _SHIFT * down], dim=1)
    places = affine_grid(torch.stack([across, along], dim=1), list(x.shape), align_corners=False)
    strength = 2 * _BEND * torch.rand(count, 1, 1, 1, generator=stream)
    controls = strength * torch.randn(count, 2, _CONTROLS, _CONTROLS, generator=stream)
    bend = interpolate(controls, size=x.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return grid_sample(x, (places + bend).to(x), padding_mode="border", align_corners=False)


def cluttered(x: Tensor, low: float, high: float, stream: torch.Generator) -> Tensor:
    """Half of the images (N, C, H, W) with a random pattern added, half with a random rectangle, inside the range."""
    if x.ndim != 4:
        return x
    count, channels, height, width = x.shape
    cells = int(torch.randint(2, max(3, min(height, width) // 2 + 1), (), generator=stream))
    pattern = torch.randn(count, channels, cells, cells, generator=stream)
    pattern = interpolate(pattern, size=(height, width), mode="bilinear", align_corners=True)
    strength = _PATTERN * (high - low) * torch.rand(count, 1, 1, 1, generator=stream)
    strength = strength * (torch.rand(count, 1, 1, 1, generator=stream) < 0.5)
    x = (x + (strength * pattern / pattern.abs().amax(dim=(1, 2, 3), keepdim=True)).to(x)).clamp(low, high)
    value = (low + (high - low) * torch.rand(count, channels, 1, 1, generator=stream)).to(x)
    return torch.where(_rectangles(count, height, width, stream).to(x.device), value, x)


def _rectangles(count: int, height: int, width: int, stream: torch.Generator) -> Tensor:
    """(N, 1, H, W) bool: a rectangle of up to a quarter of each side in half of the images, none in the others."""
    inside = (torch.rand(count, 1, 1, 1, generator=stream) < 0.5).expand(count, 1, height, width)
    for side, shape in ((height, (1, 1, -1, 1)), (width, (1, 1, 1, -1))):
        length = 1 + torch.rand(count, 1, 1, 1, generator=stream) * side / 4
        first = torch.rand(count, 1, 1, 1, generator=stream) * side - length / 2
        cells = torch.arange(side).reshape(shape)
        inside = inside & (cells >= first) & (cells < first + length)
    return inside
