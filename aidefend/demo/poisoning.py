"""Chapter 1: a backdoor in the training data, found without being told where it is."""

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from aidefend._core.evidence import Evidence, Finding
from aidefend._core.stats import wilson
from aidefend.attacks.poisoning import Patch
from aidefend.audit import SummaryRow, audit_poisoning
from aidefend.audit.drawing import images
from aidefend.demo.world import Chapter, Tell, World, measured, renamed, share_of, train
from aidefend.sanitize import screen

EPOCHS = 6
ARMS = {"undefended": "no filter", "screened": "screened", "random": "random filter", "perfect": "perfect filter"}


def poisoning(world: World, tell: Tell) -> Chapter:
    """Poison 5 % of the digits, train, screen, train again; beside it a random and a perfect filter."""
    attack = Patch(target=7, rate=0.05)
    poisoned = attack.poison(world.train, seed=world.seed_of("poison"))
    tell(
        f"{int(poisoned.is_poison.sum())} of {len(world.train)} samples get a 3 x 3 patch and the label {attack.target}"
    )
    victim = _trained(world, poisoned.dataset, "undefended")
    report = screen(poisoned.dataset, model=victim, seed=world.seed)
    tell(f"screen() quarantines {int((~report.keep).sum())} of {len(report)} samples")
    removed = int((~report.keep).sum())
    order = torch.randperm(len(report), generator=torch.Generator().manual_seed(world.seed_of("random filter")))
    clean_rows = (~poisoned.is_poison).nonzero().flatten().tolist()
    models = {
        "undefended": victim,
        "screened": _trained(world, report.view(poisoned.dataset), "screened"),
        "random": _trained(world, Subset(poisoned.dataset, order[removed:].tolist()), "random"),
        "perfect": _trained(world, Subset(poisoned.dataset, clean_rows), "perfect"),
    }
    evidence, numbers = Evidence(), {}
    for arm, model in models.items():
        found = audit_poisoning(model, test=world.test, trigger=poisoned.trigger, target=attack.target)
        numbers[arm] = tuple(found[f"poisoning.{measure}"] for measure in ("clean_accuracy", "attack_success_rate"))
        evidence += Evidence(renamed(finding, ARMS[arm]) for finding in numbers[arm])
        tell(f"{ARMS[arm]}: {_cell(numbers[arm])}")
    world.models["backdoored"], world.facts["poisoned"], world.facts["screening"] = victim, poisoned, report
    world.models["clean"] = models["perfect"]
    evidence += report.to_evidence() + _filter_quality(report.keep, poisoned.is_poison)
    row = SummaryRow(
        "data poisoning",
        "patch trigger on 5 % of the samples",
        _cell(numbers["undefended"]),
        _cell(numbers["screened"]),
        f"random filter {_cell(numbers['random'])}; perfect filter {_cell(numbers['perfect'])}",
    )
    x, _ = world.rows("test")
    pictures = (
        images([x[:8], poisoned.trigger(x[:8])], "Test digits (above) and the same digits with the trigger."),
        images([_images(report.quarantine(poisoned.dataset), 16)], "Samples that screen() put into quarantine."),
    )
    text = (
        "A stranger who contributes training data stamps a small patch on a few samples and gives them a wrong label. "
        "The model then obeys the patch. screen() knows neither patch, nor label, nor how many samples are bad."
    )
    return Chapter("Data poisoning", text, (row,), evidence, pictures)


def _trained(world: World, dataset: Dataset[tuple[Tensor, Tensor]], arm: str) -> torch.nn.Module:
    return train(
        world.net("poisoning net"), dataset, epochs=EPOCHS, seed=world.seed_of("poisoning order"), name=ARMS[arm]
    )


def _filter_quality(keep: Tensor, is_poison: Tensor) -> Evidence:
    """Against the ground truth, which only the demo knows."""
    caught, wrong = int((~keep & is_poison).sum()), int((~keep & ~is_poison).sum())
    n_bad, n_good = int(is_poison.sum()), int((~is_poison).sum())
    limits = "Measured on this one poison; screen() did not see the ground truth."
    return Evidence(
        [
            measured(
                "sanitize.poison_found",
                "Poisoned samples in quarantine",
                wilson(caught, n_bad),
                n_bad,
                limits=limits,
            ),
            measured(
                "sanitize.clean_lost", "Clean samples in quarantine", wilson(wrong, n_good), n_good, limits=limits
            ),
        ]
    )


def _cell(pair: tuple[Finding, ...]) -> str:
    return f"{share_of(pair[1])} success, {share_of(pair[0])} accuracy"


def _images(dataset: Dataset[tuple[Tensor, Tensor]], most: int) -> Tensor:
    count = min(most, len(dataset))  # type: ignore[arg-type]  # a Subset has a length
    return torch.stack([dataset[i][0] for i in range(count)]) if count else torch.zeros(1, 1, 28, 28)
