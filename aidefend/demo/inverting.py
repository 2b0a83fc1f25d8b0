"""Chapter 9: model inversion against the undefended model, the private one, and hardened outputs."""

import torch
from torch import Tensor, nn

from aidefend._core.evidence import Evidence
from aidefend.attacks import ClassInversion
from aidefend.audit import SummaryRow, audit_inversion
from aidefend.audit.drawing import images
from aidefend.demo.world import Chapter, Tell, World, renamed
from aidefend.validate import LabelOnly

STEPS = 100


class _Hardened(nn.Module):
    """A model that answers with labels only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.output = model, LabelOnly()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.model(x))


def inverting(world: World, tell: Tell) -> Chapter:
    """Reconstruct every class from each model; an evaluator trained apart says what it sees."""
    victims = {
        "undefended": world.models["overfitted"],
        "private": world.models["private"],
        "labels only": _Hardened(world.models["overfitted"]).eval(),
    }
    evidence, shares, pictures = Evidence(), {}, []
    for name, model in victims.items():
        found = audit_inversion(
            model, world.train, world.test, evaluator=world.models["clean"], steps=STEPS, per_class=2, seed=world.seed
        )
        seen = found["inversion.evaluator_accuracy"]
        shares[name] = "not shown" if seen.value is None else f"{100 * float(seen.value):.0f} %"
        tell(f"{name}: the evaluator recognises the class in {shares[name]} of the reconstructions ({seen.status})")
        evidence += Evidence(renamed(finding, name, secure=name == "private") for finding in found.findings)
        shape = tuple(world.rows("train")[0].shape[1:])
        pictures.append(ClassInversion(steps=STEPS)(model, torch.arange(10), shape=shape, seed=world.seed).x)
    row = SummaryRow(
        "model inversion",
        "class reconstruction by gradient, or by probing",
        f"class recognised in {shares['undefended']}",
        f"private {shares['private']}; labels only {shares['labels only']}",
        "a class of many writers has a typical member, which is no secret; output hardening is no privacy",
    )
    caption = "Reconstructions of the ten classes: undefended, private, and through labels only."
    return Chapter("Model inversion", _TEXT, (row,), evidence, (images(pictures, caption),))


_TEXT = (
    "From the model alone an adversary searches for an input that it takes for a class. Where a class is one person, "
    "that input is a likeness. Privacy bounds what one record adds; hardened outputs only raise the price."
)
