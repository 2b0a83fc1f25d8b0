"""Each part of the audit alone, on models whose weakness is known."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aidefend._core.errors import BudgetExceeded, ConfigurationError, IncompatibleModel, UnsafeArtifact
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import roc_auc, wilson
from aidefend._core.threat import Threat
from aidefend.attacks.inversion import ClassInversion
from aidefend.audit import (
    audit_artifacts,
    audit_evasion,
    audit_extraction,
    audit_guard,
    audit_inversion,
    audit_membership,
    audit_poisoning,
    joint_margin,
    passes_and_fools,
    reconstruct,
)
from aidefend.audit.mapping import NAMES, better, references
from aidefend.audit.subject import Samples, samples_of
from tests.worlds import linear_world, two_point_membership_world


def nearest_mean_train_fn(dataset, seed):
    """A real, fast training procedure: class means, softmax over distances."""
    x = torch.stack([dataset[i][0] for i in range(len(dataset))])
    y = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
    means = torch.stack([x[y == k].mean(dim=0) if bool((y == k).any()) else torch.zeros_like(x[0]) for k in range(3)])
    return lambda rows: -20 * (rows[:, None] - means).flatten(2).square().mean(dim=2)


def images(n=240, seed=0):
    """Three classes of 1 x 6 x 6 images around known means."""
    stream = torch.Generator().manual_seed(seed)
    means = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    y = torch.arange(n) % 3
    return (means[y] + 0.15 * torch.randn(n, 1, 6, 6, generator=stream)).clamp(0, 1), y


# membership -----------------------------------------------------------------------------------------------------------


def test_membership_numbers_are_those_of_the_world():
    world = two_point_membership_world(n=200, sure_in=0.9, sure_out=0.0)
    evidence = audit_membership(world.model, world.members, world.others, fpr=0.05)
    area, rate = evidence["membership.auc"], evidence["membership.tpr_at_fpr_0.05"]
    assert area.value == pytest.approx(world.auc) and area.n == 400 and area.severity is Severity.HIGH
    assert (rate.value, rate.low, rate.high) == wilson(180, 200)
    assert area.mapping == {"atlas": "AML.T0024.000", "nist": "NISTAML.033", "owasp": "ML04:2023"}
    null = two_point_membership_world(n=200, sure_in=0.5, sure_out=0.5)
    assert audit_membership(null.model, null.members, null.others)["membership.auc"].severity is Severity.INFO


def test_membership_default_id_and_samples_cap():
    world = two_point_membership_world(n=300)
    evidence = audit_membership(world.model, world.members, world.others, samples=100)
    assert evidence["membership.tpr_at_fpr_0.01"].n == 200
    again = audit_membership(world.model, world.members, world.others, samples=100)
    other = audit_membership(world.model, world.members, world.others, samples=100, seed=1)
    assert evidence.digest == again.digest != other.digest


def test_test_samples_that_leaked_into_training_do_not_count_as_non_members():
    world = two_point_membership_world(n=100, sure_in=1.0, sure_out=0.0)
    leaky = tuple(torch.cat([a[:40], b]) for a, b in zip(world.members, world.others, strict=True))
    finding = audit_membership(world.model, world.members, leaky)["membership.auc"]
    assert finding.value == 1.0 and finding.setting["test_inputs_in_train"] == 40
    with pytest.raises(ConfigurationError, match="not in train"):
        audit_membership(world.model, world.members, world.members)


def test_lira_beats_the_loss_where_samples_differ():
    x, y = torch.linspace(0, 1, 200)[:, None], torch.zeros(200, dtype=torch.int64)

    def train_fn(dataset, seed):
        seen = torch.stack([dataset[i][0] for i in range(len(dataset))])

        def model(rows):
            known = (rows[:, None] == seen).all(dim=2).any(dim=1).float()
            return torch.stack([known + 3 * torch.sin(37 * rows[:, 0]), torch.zeros(len(rows))], dim=1)

        return model

    inside = torch.arange(200) % 2 == 0
    train, test = (x[inside], y[inside]), (x[~inside], y[~inside])
    model = train_fn(TensorDataset(*train), 0)
    evidence = audit_membership(model, train, test, train_fn=train_fn, shadows=4)
    assert evidence["membership.auc"].value < 0.75
    assert evidence["membership.lira.auc"].value > 0.99
    assert evidence["membership.lira.tpr_at_fpr_0.01"].value > 0.9


# poisoning ------------------------------------------------------------------------------------------------------------


class Backdoored(nn.Module):
    """Right by the first feature; says class 2 for a share of the samples whose last feature is above 0.9."""

    def __init__(self, share=1.0):
        super().__init__()
        self.share = share

    def forward(self, x):
        logits = nn.functional.one_hot(x[:, 0].long(), 3).float()
        hit = (x[:, -1] > 0.9) & (x[:, 1] < self.share)
        return torch.where(hit[:, None], torch.tensor([0.0, 0.0, 5.0]), logits)


def stamped(x):
    marked = x.clone()
    marked[:, -1] = 1.0
    return marked


def classes(n=300):
    y = torch.arange(n) % 3
    return torch.stack([y.float(), (torch.arange(n) // 3) / (n // 3), torch.zeros(n)], dim=1), y


@pytest.mark.parametrize("target", [2, None])
def test_a_backdoor_is_measured_and_its_target_found(target):
    evidence = audit_poisoning(Backdoored(), test=classes(), trigger=stamped, target=target)
    finding = evidence["poisoning.attack_success_rate"]
    assert evidence["poisoning.clean_accuracy"].value == 1.0
    assert finding.value == 1.0 and finding.setting["target"] == 2 and finding.severity is Severity.HIGH
    assert finding.n == 200 or target is None


def test_the_success_rate_counts_samples_of_other_classes_only():
    finding = audit_poisoning(Backdoored(0.3), test=classes(), trigger=stamped, target=2)[
        "poisoning.attack_success_rate"
    ]
    assert (finding.value, finding.low, finding.high) == wilson(60, 200) and finding.severity is Severity.MEDIUM
    clean = audit_poisoning(Backdoored(0.0), test=classes(), trigger=stamped, target=2)
    assert clean["poisoning.attack_success_rate"].severity is Severity.INFO


def test_training_on_poison_is_measured_with_train_fn():
    train, test = images(300, 0), images(150, 1)

    class Marker:
        """Half of class 1 becomes class 0 with a bright corner: nearest means learn a little of it."""

        target = 0

        def poison(self, dataset, seed=0):
            x = torch.stack([dataset[i][0] for i in range(len(dataset))])
            y = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
            rows = torch.arange(len(x)) % 2 == 0
            x[rows], y[rows] = self.trigger(x[rows]), 0
            self.dataset, self.is_poison = TensorDataset(x, y), rows
            return self

        def trigger(self, x):
            marked = x.clone()
            marked[:, :, 2:, 2:] = 1.0
            return marked

    evidence = audit_poisoning(None, train, test, train_fn=nearest_mean_train_fn, attack=Marker())
    assert evidence["poisoning.attack_success_rate"].value > 0.9
    assert "trained on data poisoned by Marker" in evidence["poisoning.clean_accuracy"].title
    both = audit_poisoning(
        nearest_mean_train_fn(TensorDataset(*train), 0),
        train,
        test,
        trigger=lambda x: x * 0.999,
        target=0,
        train_fn=nearest_mean_train_fn,
        attack=Marker(),
    )
    assert both["poisoning.attack_success_rate"].value < 0.1 < both["poisoning.retrained_attack_success_rate"].value


def test_poison_without_a_trigger_and_bad_triggers():
    evidence = audit_poisoning(Backdoored(), test=classes(), trigger=lambda x: x)
    assert evidence["poisoning.attack_success_rate"].status == "not shown"
    with pytest.raises(ConfigurationError, match="of shape"):
        audit_poisoning(Backdoored(), test=classes(), trigger=lambda x: x[:, :1])
    with pytest.raises(ConfigurationError, match="trigger or train_fn"):
        audit_poisoning(Backdoored(), test=classes())
    x, y = classes()
    with pytest.raises(ConfigurationError, match="other classes"):
        audit_poisoning(Backdoored(), test=(x[y == 2], y[y == 2]), trigger=stamped, target=2)


# inversion ------------------------------------------------------------------------------------------------------------


def test_inversion_of_class_means_reaches_the_training_data_and_convinces_an_evaluator():
    train, test = images(240, 0), images(120, 1)
    means = nearest_mean_train_fn(TensorDataset(*train), 0)

    def model(x):
        """With a fourth class "none of them", class k is most likely at its own mean."""
        return torch.cat([20 * means(x), torch.full((len(x), 1), -2.0)], dim=1)

    attack = ClassInversion(steps=120, total_variation=0.0, l2=0.0)
    evidence = audit_inversion(model, train, test, train_fn=nearest_mean_train_fn, attack=attack, per_class=2)
    accuracy, ratio = evidence["inversion.evaluator_accuracy"], evidence["inversion.nearest_distance_ratio"]
    assert accuracy.value == 1.0 and accuracy.n == 6 and accuracy.setting["method"] == "gradient"
    assert ratio.value < 1 and ratio.low <= ratio.value <= ratio.high and ratio.severity is Severity.HIGH


def test_noise_is_no_reconstruction():
    """A model that ignores its training data: reconstructions are far from it, and an evaluator sees chance."""
    train, test = images(240, 0), images(120, 1)
    weights = torch.randn(36, 3, generator=torch.Generator().manual_seed(3))
    evidence = audit_inversion(
        lambda x: x.flatten(1) @ weights, train, test, train_fn=nearest_mean_train_fn, steps=40, per_class=2
    )
    assert evidence["inversion.nearest_distance_ratio"].value > 1.2
    assert evidence["inversion.nearest_distance_ratio"].severity is Severity.INFO
    assert evidence["inversion.confidence"].value > 0.9


def test_inversion_says_what_it_could_not_do():
    train = images(60, 0)
    constant = audit_inversion(lambda x: torch.ones(len(x), 3), train, steps=1)
    assert constant["inversion.evaluator_accuracy"].status == "not shown"
    model = nearest_mean_train_fn(TensorDataset(*train), 0)
    alone = audit_inversion(model, train, steps=2)
    assert alone["inversion.evaluator_accuracy"].status == "not tested"
    assert alone["inversion.nearest_distance_ratio"].status == "not tested"
    made = reconstruct(model, Samples(*train), attack=ClassInversion(steps=5), per_class=1)
    assert made.nearest.shape == made.result.x.shape == (3, 1, 6, 6)
    distance = (made.result.x[0] - train[0][train[1] == 0]).flatten(1).norm(dim=1)
    assert torch.equal(made.nearest[0], train[0][train[1] == 0][distance.argmin()])


# extraction -----------------------------------------------------------------------------------------------------------


def test_extraction_finds_more_with_more_queries_and_names_the_budget():
    train, test = images(300, 0), images(600, 1)
    model = nearest_mean_train_fn(TensorDataset(*train), 0)
    evidence = audit_extraction(model, test=test, queries=(3, 200))
    few, many = evidence["extraction.agreement_at_3"], evidence["extraction.agreement_at_200"]
    assert many.value > 0.95 > few.value and many.severity is Severity.HIGH and many.n == 300
    assert evidence["extraction.agreement"].value == many.value
    assert evidence["extraction.queries_used"].value == 200
    assert audit_extraction(model, test=test, queries=(3, 200)).digest == evidence.digest


def test_a_budget_stops_the_extraction():
    train, test = images(300, 0), images(600, 1)
    model = nearest_mean_train_fn(TensorDataset(*train), 0)
    left = [64]

    def metered(x):
        if len(x) > left[0]:
            raise BudgetExceeded("Expected rows within the budget, got 64.")
        left[0] -= len(x)
        return model(x)

    evidence = audit_extraction(metered, test=test, queries=(200,), reference=model)
    assert evidence["extraction.queries_used"].value == 64
    assert "BudgetExceeded" in evidence["extraction.agreement"].limits


def test_a_copy_that_only_says_the_commonest_class_is_no_finding():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    evidence = audit_extraction(
        lambda rows: torch.tensor([[5.0, 0.0]]).expand(len(rows), 2), test=(x, (x[:, 0] > 9).long())
    )
    assert evidence["extraction.agreement"].value == 1.0 and evidence["extraction.agreement"].severity is Severity.INFO


# evasion, artifacts, guard -------------------------------------------------------------------------------------------


def test_evasion_equals_the_closed_form_of_a_linear_model():
    world = linear_world(n=64, dtype=torch.float32)
    eps = float(world.flipping_eps("linf").median())
    evidence = audit_evasion(world.model, test=(world.x, world.y), threat=Threat("linf", eps), budget="quick")
    stands = (world.worst_margin_in_box(eps, 0.0, 1.0) < 0).float().mean()
    assert evidence["evasion.robust_accuracy"].value == pytest.approx(float(stands), abs=1.5 / 64)
    assert evidence["evasion.robust_accuracy"].mapping["owasp"] == "ML01:2023"
    assert "evasion.clean_accuracy" in evidence


def test_artifacts_keep_the_inspectors_findings_and_count_problems():
    bad = Finding("artifacts.unsafe", "a pickle", Severity.CRITICAL, setting={"path": "model.pkl"})
    good = Finding("artifacts.accepted", "weights")
    evidence = audit_artifacts(path="x", inspector=lambda path: Evidence([good, bad]))
    assert evidence["artifacts.problems"].value == 1 and evidence["artifacts.problems"].severity is Severity.CRITICAL
    assert evidence["artifacts.unsafe"].mapping["cwe"] == "CWE-502"
    empty = audit_artifacts(path="x", inspector=lambda path: Evidence())
    assert empty["artifacts.problems"].status == "failed"

    def changed(path):
        raise UnsafeArtifact("Expected the signed digest.")

    refused = audit_artifacts(path="x", inspector=lambda path: Evidence([good]), verifier=changed)
    assert refused["artifacts.verified"].value == "no" and refused["artifacts.verified"].severity is Severity.CRITICAL
    with pytest.raises(ConfigurationError, match="return Evidence"):
        audit_artifacts(path="x", inspector=lambda path: None)


class Decision:
    def __init__(self, accepted, outputs):
        self.accepted, self.outputs = accepted, outputs


class BoxGuard(nn.Module):
    """Refuses what has a second feature above a limit; a model decides by the first feature."""

    def __init__(self, limit, alpha=None, n=None):
        super().__init__()
        self.limit, self.model = limit, lambda x: torch.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], dim=1) * 4
        if alpha is not None:
            self.calibration = type("Calibration", (), {"alpha": alpha, "n": n})()

    def forward(self, x):
        return Decision(x[:, 1] <= self.limit, self.model(x))

    def attackable(self):
        def whole(x):
            logits = self.model(x)
            refusal = logits.amax(dim=1) + 10 * (x[:, 1] - self.limit)
            return torch.cat([logits, refusal[:, None]], dim=1)

        return whole


def guarded_rows(n=200):
    second = torch.linspace(0, 1, n)
    first = torch.where(torch.arange(n) % 2 == 0, 0.7, 0.3)
    return torch.stack([first, second], dim=1), (torch.arange(n) % 2)


def test_false_positives_are_compared_with_the_promise():
    honest = audit_guard(test=guarded_rows(), guard=BoxGuard(0.9, alpha=0.1, n=999))["guard.false_positive_rate"]
    assert honest.value == pytest.approx(0.1) and honest.severity is Severity.INFO and honest.setting["alpha"] == 0.1
    broken = audit_guard(test=guarded_rows(), guard=BoxGuard(0.5, alpha=0.1, n=999))["guard.false_positive_rate"]
    assert broken.value == pytest.approx(0.5) and broken.severity is Severity.HIGH
    silent = audit_guard(test=guarded_rows(), guard=BoxGuard(2.0, alpha=0.1, n=999))["guard.false_positive_rate"]
    assert silent.severity is Severity.LOW
    unknown = audit_guard(test=guarded_rows(), guard=BoxGuard(0.9))
    assert "No promised rate" in unknown["guard.false_positive_rate"].limits
    assert unknown["guard.joint_attack_success"].status == "not tested"
    named = audit_guard(test=guarded_rows(), guard=BoxGuard(0.5), alpha=0.5, calibration_n=999)
    assert named["guard.false_positive_rate"].severity is Severity.INFO


def test_an_attack_on_the_whole_passes_where_the_naive_one_is_refused():
    """The naive attack's shortest way crosses the guard's limit; within the same threat there is a way below it."""
    guard = BoxGuard(0.9)
    guard.model = lambda x: torch.stack([4 * (x[:, 0] + x[:, 1]) - 5.0, torch.zeros(len(x))], dim=1)
    x = torch.tensor([[0.1, 0.85]]).repeat(20, 1) + torch.arange(20)[:, None] * 1e-4
    y = torch.ones(20, dtype=torch.int64)
    evidence = audit_guard(test=(x, y), guard=guard, threat=Threat("linf", 0.4), steps=30)
    assert evidence["guard.naive_attack_success"].value == 0.0
    assert evidence["guard.joint_attack_success"].value == 1.0
    assert evidence["guard.joint_attack_success"].severity is Severity.HIGH


def test_the_joint_margin_is_positive_exactly_where_the_attack_wins():
    stream = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(500, 5, generator=stream), torch.randint(0, 4, (500,), generator=stream)
    assert torch.equal(joint_margin(outputs, y) > 0, passes_and_fools(outputs, y))


def test_attacks_outside_the_threat_are_refused():
    with pytest.raises(ConfigurationError, match="inside the threat"):
        audit_guard(
            test=guarded_rows(),
            guard=BoxGuard(0.9),
            threat=Threat("linf", 0.01),
            attack=lambda model, x, y, generator=None: 1 - x,
        )


# what all parts share ------------------------------------------------------------------------------------------------


def test_models_in_train_mode_and_data_without_labels_are_refused():
    x, y = images(12)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)).train()
    for call in (
        lambda: audit_membership(model, (x, y), images(12, 1)),
        lambda: audit_inversion(model, (x, y)),
        lambda: audit_extraction(model, test=(x, y)),
        lambda: audit_poisoning(model, test=(x, y), trigger=lambda rows: rows + 1),
    ):
        with pytest.raises(IncompatibleModel, match="eval mode"):
            call()
    with pytest.raises(ConfigurationError, match="labels"):
        audit_membership(model.eval(), x, (x, y))
    with pytest.raises(ConfigurationError, match="callable"):
        audit_membership("model", (x, y), (x, y))
    with pytest.raises(ConfigurationError, match="at least one sample"):
        samples_of((x[:0], y[:0]), "test")


def test_every_catalogue_entry_has_a_name_and_every_measure_a_direction():
    for part in ("evasion", "poisoning", "membership", "inversion", "extraction", "privacy", "artifacts", "guard"):
        entries = [entry for text in references(f"{part}.anything").values() for entry in text.split(", ")]
        assert entries and all(entry in NAMES for entry in entries)
    assert better("membership.lira.auc") == better("storage.problems") == "low"
    assert better("evasion.robust_accuracy") == "high" and better("unheard.of") is None
    assert references("storage.secret")["cwe"] == "CWE-312" and references("unheard.of") == {}


def test_the_auc_of_the_audit_is_the_auc_of_the_scores():
    world = two_point_membership_world(50, 0.62, 0.4)
    finding = audit_membership(world.model, world.members, world.others)["membership.auc"]
    expected = roc_auc(world.members[0][:, 0], world.others[0][:, 0])
    assert math.isclose(finding.low, expected.low) and math.isclose(finding.high, expected.high)
