"""The guard around a model: verdicts by row, refusals in calibration, modes, no trace, threads, compiled models."""

import copy
import dataclasses
import gc
import math
import shutil
import threading

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, IncompatibleModel, InputRejected
from aidefend._core.batches import content_ids
from aidefend.validate import (
    Energy,
    Ensemble,
    Guard,
    InputSpec,
    KeyedNoise,
    LabelOnly,
    Mahalanobis,
    NearestNeighbours,
    ReverseSigmoid,
    Rounded,
    TopK,
)
from tests.validate.small_world import model, rows, strange

DETECTORS = [Energy(), NearestNeighbours(k=5)]
FIT = rows(200, 1)
CALIBRATION = rows(300, 2)
TEST = rows(50, 3)[0]
KNOWN = TEST[5:10]  # rows that every guard below accepts


def guard_of(network=None, **options):
    options = {"detectors": DETECTORS, "alpha": 0.05, "fit": FIT, **options}
    return Guard.calibrate(model() if network is None else network, CALIBRATION, **options)


def test_clean_rows_get_the_models_outputs_and_strange_rows_a_constant():
    guard = guard_of()
    x = torch.cat([KNOWN, strange(5)])
    decision = guard(x)
    assert decision.accepted.dtype == torch.bool and decision.accepted.tolist() == [True] * 5 + [False] * 5
    torch.testing.assert_close(decision.outputs[:5], guard.model(KNOWN).detach())
    assert bool(decision.outputs[5:].isnan().all())
    assert set(decision.p_values) == {"energy", "nearest-neighbours", "combined"}
    assert all(len(values) == 10 for values in decision.p_values.values())
    assert bool((decision.p_values["combined"][5:] <= 0.05).all())
    assert decision.reasons[0] == () and decision.reasons[9][0].startswith("detector: unlike the calibration data (")
    report = decision.report
    assert report.ids == content_ids(x) and torch.equal(report.keep, decision.accepted)
    assert report.method == "guard" and set(report.scores) == set(decision.p_values)
    assert "exchangeable" in report.limits


def test_the_report_is_made_when_it_is_read_and_names_no_row_by_what_it_has_become():
    guard, x = guard_of(), TEST.clone()
    read, late = guard(x), guard(x)
    assert read.report.ids == content_ids(x) and read.report is read.report
    x[0] += 1
    assert late.report.ids[0] == "row-0" and read.report.ids[0] != "row-0"
    with torch.inference_mode():
        assert guard(TEST.clone()).report.ids == content_ids(TEST)


def test_a_decision_is_frozen():
    decision = guard_of()(TEST)
    with pytest.raises(AttributeError):
        decision.accepted = torch.ones(50, dtype=torch.bool)
    with pytest.raises(TypeError):
        decision.p_values["combined"] = None


def test_the_same_rows_get_the_same_decision():
    guard = guard_of()
    first, second = guard(TEST), guard(TEST)
    assert torch.equal(first.accepted, second.accepted)
    torch.testing.assert_close(first.outputs, second.outputs, rtol=0, atol=0, equal_nan=True)
    assert first.report.to_dict() == second.report.to_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e6, 1e38])
def test_a_bad_row_never_harms_its_batch_mates(bad):
    """The model normalises over the batch on purpose: had the bad row reached it, every row would be NaN."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            return self.inner(x) + 0 * x.sum() / x.numel()

    guard = guard_of(Mixing())
    x = TEST.clone()
    x[7, 2] = bad
    decision, clean = guard(x), guard(TEST)
    others = torch.arange(50) != 7
    assert not decision.accepted[7] and torch.equal(decision.accepted[others], clean.accepted[others])
    assert decision.p_values["combined"][7].isnan()
    good = others & clean.accepted
    torch.testing.assert_close(decision.outputs[good], clean.outputs[good])
    torch.testing.assert_close(decision.p_values["combined"][others], clean.p_values["combined"][others])
    assert decision.reasons[7][0] in ("input: not finite", "input: out of range")


HOSTILE = [
    None,
    "text",
    b"bytes",
    3,
    [[1.0] * 6],
    {"x": 1},
    TEST.numpy(),
    TEST[0],
    torch.tensor(1.0),
    TEST.double(),
    TEST.half(),
    TEST.long(),
    TEST[:, :5],
    TEST[:, :, None],
    TEST.to_sparse(),
    TEST.to("meta"),
    nn.Parameter(TEST.clone()),
    torch.zeros(1, 6).expand(50, 6),
    torch.zeros(1, 6).expand(10**12, 6),
    torch.zeros(20_000, 6),
]


@pytest.mark.parametrize("x", HOSTILE, ids=lambda x: type(x).__name__)
def test_whatever_arrives_is_refused_without_raising(x):
    guard = guard_of()
    decision = guard(x)
    assert len(decision.accepted) >= 1 and not bool(decision.accepted.any())
    assert len(decision.reasons) == len(decision.accepted) == len(decision.outputs)
    assert decision.reasons[0][0].startswith("input: ") and not bool(decision.report.keep.any())
    assert decision.outputs.shape[1:] == (3,) and bool(decision.outputs[:3].isnan().all())
    with pytest.raises(InputRejected, match="refused") as caught:
        guard.predict(x)
    assert caught.value.report.method == "guard"
    assert "input:" not in str(caught.value)


def test_a_giant_that_is_refused_costs_no_memory():
    decision = guard_of()(torch.zeros(1, 6).expand(10**12, 6))
    assert len(decision.accepted) == 2**24 and decision.outputs.untyped_storage().nbytes() < 100
    assert len(decision.report) == 1 and decision.report.ids == ("batch",)
    assert decision.reasons[2**24 - 1] == ("input: too many rows",) and len(decision.reasons[5:10]) == 5
    with pytest.raises(IndexError):
        decision.reasons[2**24]


def test_an_empty_batch_is_answered_with_no_rows():
    guard = guard_of()
    decision = guard(torch.zeros(0, 6))
    assert decision.accepted.shape == (0,) and decision.outputs.shape == (0, 3) and decision.reasons == ()
    assert guard.predict(torch.zeros(0, 6)).shape == (0, 3)


def test_predict_gives_outputs_or_raises():
    guard = guard_of()
    good = TEST[guard(TEST).accepted]
    torch.testing.assert_close(guard.predict(good), guard.model(good).detach())
    with pytest.raises(InputRejected, match="got 1 of") as caught:
        guard.predict(torch.cat([good[:3], strange(1)]))
    assert caught.value.report.keep.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("output", "constant"),
    [
        (LabelOnly(), -1),
        (TopK(2), math.nan),
        (Rounded(1), math.nan),
        (ReverseSigmoid(), math.nan),
        (None, math.nan),
    ],
)
def test_hardened_outputs_and_their_constant(output, constant):
    guard = guard_of(output=output)
    decision = guard(torch.cat([KNOWN[:4], strange(2)]))
    logits = guard.model(KNOWN[:4]).detach()
    torch.testing.assert_close(decision.outputs[:4], logits if output is None else output(logits))
    expected = torch.full_like(decision.outputs[4:], constant)
    torch.testing.assert_close(decision.outputs[4:], expected, equal_nan=True)
    refused = guard("not a tensor")
    assert refused.outputs.dtype == decision.outputs.dtype and refused.outputs.shape[1:] == decision.outputs.shape[1:]


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
def test_an_output_that_reads_the_inputs_gets_those_of_the_answered_rows(mode):
    noisy = KeyedNoise(bytes(16), scale=0.3)
    guard = guard_of(output=noisy, mode=mode)
    x = torch.cat([torch.full((1, 6), math.nan), KNOWN[:3], strange(1)])
    decision, rows_of = guard(x), slice(1, 4)
    torch.testing.assert_close(decision.outputs[rows_of], noisy(guard.model(KNOWN[:3]).detach(), KNOWN[:3]))
    assert bool(decision.outputs[0].isnan().all()) and bool(decision.outputs[4].isnan().all()) == (mode == "enforce")
    torch.testing.assert_close(guard(KNOWN[1:2]).outputs, decision.outputs[2:3])


def test_monitor_answers_strange_rows_but_not_malformed_ones():
    x = torch.cat([KNOWN[:2], strange(1), torch.full((1, 6), math.nan)])
    decision = guard_of(mode="monitor", output=LabelOnly())(x)
    assert decision.accepted.tolist() == [True, True, True, False]
    assert decision.report.keep.tolist() == [True, True, False, False]
    assert decision.reasons[2][0].startswith("detector:") and decision.reasons[3] == ("input: not finite",)
    assert decision.outputs.dtype == torch.int64 and decision.outputs[3] == -1


def test_shadow_gives_the_bare_models_outputs():
    x = torch.cat([KNOWN[:2], strange(1), torch.full((1, 6), math.nan)])
    guard = guard_of(mode="shadow", output=LabelOnly())
    decision = guard(x)
    assert decision.accepted.all() and decision.report.keep.tolist() == [True, True, False, False]
    torch.testing.assert_close(decision.outputs, guard.model(x).detach(), equal_nan=True)
    assert not guard(TEST.double()).accepted.any()


def test_calibrated_verdicts_are_the_same_in_every_mode():
    x = torch.cat([TEST, strange(3)])
    reports = [guard_of(mode=mode)(x).report for mode in ("enforce", "monitor", "shadow")]
    assert reports[0].reasons == reports[1].reasons == reports[2].reasons
    for report in reports[1:]:
        torch.testing.assert_close(report.p_values["combined"], reports[0].p_values["combined"])


class Sick(nn.Module):
    """Gives NaN for rows whose first feature is above a limit, and raises above another."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, x):
        if bool((x[:, 0] > 9.5).any()):
            raise RuntimeError("secret detail")
        logits = self.inner(x)
        return torch.where(x[:, :1] > 9.0, torch.nan, logits)


def test_rows_whose_output_is_not_finite_are_refused_alone():
    guard = guard_of(Sick(), spec=InputSpec((6,), low=-20, high=20))
    x = TEST[:3].clone()
    x[1, 0] = 9.2
    decision = guard(x)
    assert decision.reasons[1] == ("model: output not finite",) and not decision.accepted[1]
    assert decision.accepted[[0, 2]].all() == guard(TEST[[0, 2]]).accepted.all()


def test_a_model_that_raises_refuses_the_batch_and_tells_the_client_nothing():
    guard = guard_of(Sick(), spec=InputSpec((6,), low=-20, high=20))
    x = TEST[:3].clone()
    x[1, 0] = 9.9
    decision = guard(x)
    assert not decision.accepted.any() and decision.reasons[0] == ("error: model failed (RuntimeError)",)


class Broken:
    """A detector of the user's own that works in calibration and fails in service."""

    name, uses_features = "broken", False

    def __init__(self):
        self.fails = False

    def fit(self, features, logits, labels=None):
        return self

    def score(self, features, logits):
        if self.fails:
            raise ZeroDivisionError
        return logits[:, 0]


@pytest.mark.parametrize(("mode", "answered"), [("enforce", False), ("monitor", True), ("shadow", True)])
def test_a_detector_that_fails_refuses_every_row(mode, answered):
    broken = Broken()
    guard = guard_of(detectors=[Energy(), broken], mode=mode)
    assert guard(TEST).report.keep.any()
    broken.fails = True
    decision = guard(TEST)
    assert not decision.report.keep.any() and bool(decision.accepted.all()) == answered
    assert decision.reasons[0] == ("error: detectors failed (ZeroDivisionError)",)


def test_a_model_in_train_mode_is_refused_at_both_ends():
    network = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    with pytest.raises(IncompatibleModel, match="eval mode") as caught:
        guard_of(network.train())
    assert [offender.path for offender in caught.value.offenders] == ["1", "2"]
    guard = guard_of(network.eval())
    assert guard(TEST).accepted.any()
    network[1].train()
    decision = guard(TEST)
    assert not decision.accepted.any() and "IncompatibleModel" in decision.reasons[0][0]
    guard.train()
    assert not network[1].training and guard(TEST).accepted.any()


def test_probabilities_are_refused():
    with pytest.raises(IncompatibleModel, match="before softmax"):
        guard_of(nn.Sequential(model(), nn.Softmax(dim=1)))


def test_outputs_that_are_not_finite_on_clean_rows_are_refused():
    network = model()
    with torch.no_grad():
        network[2].bias[0] = math.nan
    with pytest.raises(IncompatibleModel, match="200 of 200 clean rows"):
        guard_of(network)


def test_rows_that_were_used_before_cannot_calibrate():
    x, y = CALIBRATION
    with pytest.raises(ConfigurationError, match=r"not in train_ids.*1 shared"):
        guard_of(train_ids=content_ids(x[:1], y[:1]))
    with pytest.raises(ConfigurationError, match=r"not in train_ids.*2 shared"):
        guard_of(train_ids=content_ids(x[3:5]))
    with pytest.raises(ConfigurationError, match=r"not in fit.*3 shared"):
        guard_of(fit=torch.cat([FIT[0], x[:3]]))
    guard_of(train_ids=content_ids(*FIT))


def test_the_default_split_keeps_equal_rows_together_and_ignores_the_order():
    x = CALIBRATION[0]
    repeated = torch.cat([x, x[:150]])
    first = Guard.calibrate(model(), repeated, detectors=DETECTORS, alpha=0.05)
    second = Guard.calibrate(model(), repeated.flip(0), detectors=DETECTORS, alpha=0.05)
    facts = first.facts
    assert facts.fit_n + facts.reference_n + facts.calibration_n == 450 and facts == second.facts
    torch.testing.assert_close(first(TEST).p_values["combined"], second(TEST).p_values["combined"])
    other = Guard.calibrate(model(), repeated, detectors=DETECTORS, alpha=0.05, seed=1)
    assert not torch.equal(other(TEST).p_values["combined"], first(TEST).p_values["combined"])


def test_too_few_rows_say_how_many_are_needed():
    with pytest.raises(ConfigurationError, match="at least 1019 different rows"):
        guard_of(alpha=0.001)
    with pytest.raises(ConfigurationError, match="at least 999 different rows"):
        guard_of(alpha=0.001, detectors=[Energy()])


def test_rows_that_break_the_specification_are_counted_and_left_out():
    x = CALIBRATION[0].clone()
    x[:4, 0] = math.nan
    guard = Guard.calibrate(model(), x, InputSpec((6,), low=-20, high=20), [Energy()], alpha=0.05, fit=FIT)
    assert guard.facts.refused_n == 4 and guard.facts.calibration_n == 296
    assert guard.to_evidence()["guard.specification_refused_share"].value == pytest.approx(4 / 300)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"detectors": []}, ConfigurationError, "a list of detectors"),
        ({"detectors": Energy()}, ConfigurationError, "a list of detectors"),
        ({"detectors": ["energy"]}, ConfigurationError, "a list of detectors"),
        ({"alpha": 0}, ConfigurationError, "alpha"),
        ({"alpha": 1.5}, ConfigurationError, "alpha"),
        ({"mode": "audit"}, ConfigurationError, "mode to be one of"),
        ({"layer": "nine"}, ConfigurationError, "layer to be a module"),
        ({"seed": -1}, ConfigurationError, "seed"),
        ({"batch_size": 0}, ConfigurationError, "batch_size"),
        ({"spec": InputSpec((5,))}, ConfigurationError, "input: wrong shape"),
        ({"spec": InputSpec((6,), low=50.0, high=51.0)}, ConfigurationError, "at least one sample"),
        ({"fit": FIT[0][:0]}, ConfigurationError, "at least one sample"),
        ({"fit": FIT[0][:2]}, ConfigurationError, "smaller k"),
        ({"output": lambda logits: logits.argmax()}, ConfigurationError, "output to map logits"),
        ({"output": lambda logits: logits > 0}, ConfigurationError, "signed integers"),
    ],
)
def test_malformed_calibrations_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        guard_of(**options)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError):
        guard_of(aplha=0.1)


def test_no_data_is_refused():
    with pytest.raises(ConfigurationError, match="at least one sample"):
        Guard.calibrate(model(), torch.zeros(0, 6))


def test_a_model_without_a_linear_needs_a_layer_only_for_feature_detectors():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv1d(6, 3, 1)

        def forward(self, x):
            return self.head(x[:, :, None])[:, :, 0]

    with pytest.raises(IncompatibleModel, match="layer="):
        guard_of(Convolution().eval())
    assert guard_of(Convolution().eval(), layer="head")(TEST).report.keep.any()
    assert guard_of(Convolution().eval(), detectors=[Energy()])(TEST).report.keep.any()
    callable_guard = guard_of(lambda x: x[:, :3], detectors=[Energy()])
    assert callable_guard(TEST).accepted.any()
    with pytest.raises(IncompatibleModel, match=r"nn\.Module"):
        guard_of(lambda x: x[:, :3])


def test_any_layer_may_give_the_features():
    network = model()
    by_name, by_module = guard_of(network, layer="0"), guard_of(network, layer=network[0])
    assert by_name.facts.layer == by_module.facts.layer == "0" and guard_of(network).facts.layer == "2"
    assert by_name.state_dict()["detector_nearest-neighbours.bank"].shape == (200, 6)


def test_data_may_come_as_loader_or_dataset_in_any_batching():
    data = torch.utils.data.TensorDataset(*CALIBRATION)
    loader = torch.utils.data.DataLoader(data, batch_size=7, generator=torch.Generator())
    expected = guard_of()(TEST).p_values["combined"]
    for form in (data, loader, iter([CALIBRATION])):
        guard = Guard.calibrate(model(), form, detectors=DETECTORS, alpha=0.05, fit=FIT)
        torch.testing.assert_close(guard(TEST).p_values["combined"], expected)


def test_two_detectors_of_a_kind_get_two_names():
    guard = guard_of(detectors=[NearestNeighbours(k=1), NearestNeighbours(k=9), Mahalanobis()])
    assert list(guard(TEST).p_values) == ["nearest-neighbours", "nearest-neighbours-2", "mahalanobis", "combined"]


def test_nothing_of_the_users_is_touched():
    network = model()
    network[0].weight.requires_grad_(False)
    network[2].weight.grad = torch.ones_like(network[2].weight)
    before = copy.deepcopy(network.state_dict())
    guard = guard_of(network)
    x = TEST.clone().requires_grad_()
    decision = guard(x)
    assert not decision.outputs.requires_grad and x.grad is None
    assert bool((network[2].weight.grad == 1).all()) and not network[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.is_grad_enabled()


def test_closing_removes_the_hook_and_fails_closed():
    network = model()
    with guard_of(network) as guard:
        assert sum(len(module._forward_pre_hooks) for module in network.modules()) == 1
    assert sum(len(module._forward_pre_hooks) for module in network.modules()) == 0
    with pytest.raises(ConfigurationError, match="open guard"):
        guard(TEST)
    for use in (guard.attackable, lambda: guard.recalibrate(CALIBRATION, reason="why")):
        with pytest.raises(ConfigurationError, match="an open guard"):
            found = use()
            found(TEST)


def test_a_guard_that_is_dropped_leaves_no_hook():
    network = model()
    guard = Guard.calibrate(network, CALIBRATION, fit=FIT, alpha=0.05)
    view = guard.attackable()
    assert any(module._forward_pre_hooks for module in network.modules())
    del guard
    gc.collect()
    assert view(rows(3, 1)[0]).shape == (3, 4)  # a view keeps its guard
    del view
    gc.collect()
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_calibration_that_fails_leaves_no_hook():
    network = nn.Sequential(model(), nn.Softmax(dim=1))
    with pytest.raises(IncompatibleModel):
        guard_of(network)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_bare_pass_through_the_model_stores_nothing():
    guard = guard_of()
    guard.model(TEST)
    assert guard._capture._passes == {}


def test_four_threads_get_their_own_rows():
    guard = guard_of()
    batches = [rows(64, 100 + i)[0] for i in range(4)]
    expected = [guard(x) for x in batches]
    found: list[list[bool]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(25):
            decision = guard(batches[i])
            same = torch.equal(decision.outputs.nan_to_num(), expected[i].outputs.nan_to_num())
            found[i].append(same and torch.equal(decision.p_values["combined"], expected[i].p_values["combined"]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results) for results in found] == [25] * 4 and all(all(results) for results in found)


def test_it_works_under_inference_mode():
    guard = guard_of()
    with torch.inference_mode():
        inside = guard(TEST.clone())
    assert torch.equal(inside.accepted, guard(TEST).accepted)


def test_a_compiled_model_is_guarded_like_the_model_inside():
    torch.compiler.reset()
    network = model()
    compiled = torch.compile(network, backend="eager")
    guard = guard_of(compiled)
    torch.testing.assert_close(guard(TEST).p_values["combined"], guard_of(model())(TEST).p_values["combined"])
    assert guard.facts.identity == guard_of(network).facts.identity
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch about its own parts
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile needs g++ on the path")
@pytest.mark.parametrize(
    "compiled", [torch.compile, lambda network: network.compile() or network], ids=["wrapped", "own"]
)
def test_generated_code_is_guarded_like_the_model_inside(compiled):
    """The default backend, of which the quick test above knows only the tracing."""
    torch.compiler.reset()
    guard, expected = guard_of(compiled(model())), guard_of()
    for x in (TEST, TEST[:1], torch.cat([TEST[:3], strange(2)])):
        found, wanted = guard(x), expected(x)
        assert torch.equal(found.accepted, wanted.accepted)
        torch.testing.assert_close(found.outputs, wanted.outputs, equal_nan=True)
    torch.compiler.reset()


def test_a_compiled_model_that_ran_before_is_refused_with_the_cure():
    torch.compiler.reset()
    compiled = torch.compile(model(), backend="eager")
    with torch.no_grad():
        compiled(FIT[0])
    with pytest.raises(IncompatibleModel, match=r"torch\.compiler\.reset"):
        guard_of(compiled)
    torch.compiler.reset()
    assert guard_of(compiled)(TEST).accepted.any()
    torch.compiler.reset()


def test_half_precision_models_are_scored_in_full_precision():
    x = TEST.bfloat16()
    network = model().bfloat16()
    guard = Guard.calibrate(network, CALIBRATION[0].bfloat16(), detectors=DETECTORS, alpha=0.05, fit=FIT[0].bfloat16())
    decision = guard(x)
    assert decision.outputs.dtype == torch.bfloat16 and decision.accepted.float().mean() > 0.7
    assert not guard(strange(4).bfloat16()).accepted.any()


def test_casting_a_guard_casts_the_model_alone():
    guard = guard_of()
    before = {name: value.dtype for name, value in guard.calibration.named_buffers()}
    guard.double()
    assert {name: value.dtype for name, value in guard.calibration.named_buffers()} == before
    assert guard.state_dict()["detector_nearest-neighbours.bank"].dtype == torch.float32
    assert guard.model[0].weight.dtype == torch.float64


def test_state_dict_carries_model_and_calibration():
    guard, twin = guard_of(), guard_of(model(seed=0), alpha=0.05)
    names = set(guard.state_dict())
    assert {"model.0.weight", "calibration.joined", "calibration.threshold"} <= names
    twin.load_state_dict(guard.state_dict())
    assert torch.equal(twin(TEST).accepted, guard(TEST).accepted)


def test_a_copy_of_a_guard_works_alone():
    guard = guard_of()
    twin = copy.deepcopy(guard)
    guard.close()
    assert twin(TEST).accepted.any()


def test_the_summary_and_the_evidence_state_the_calibration():
    guard = guard_of()
    facts = guard.facts
    assert (facts.fit_n, facts.reference_n, facts.calibration_n) == (200, 60, 240)
    finding = guard.to_evidence()["guard.false_positive_rate"]
    assert finding.value == pytest.approx(guard.calibration.level) and finding.low < finding.value < finding.high
    assert finding.n == 240 and finding.setting["seed"] == 0 and finding.setting["alpha"] == 0.05
    assert "n=240" in guard.summary() and "0.05" in guard.summary()
    assert guard.to_evidence().to_json() == guard_of().to_evidence().to_json()


def test_a_row_in_quarantine_is_refused_and_marked():
    guard = guard_of(spec=InputSpec((6,), low=-20, high=20, out_of_range="quarantine"))
    x = rows(3, 9)[0]
    x[1, 0] = 99.0
    x[2, 0] = float("nan")
    decision = guard(x)
    assert decision.accepted.tolist() == [True, False, False]
    assert decision.quarantined.tolist() == [False, True, False]
    assert decision.reasons[1] == ("quarantine: out of range",) and not guard("no tensor").quarantined.any()


@pytest.mark.parametrize("wrong", ["energy", [], [Energy], [Energy(), NearestNeighbours], [None], Energy()])
def test_what_is_no_list_of_detectors_is_refused_with_the_cure(wrong):
    """Planted violation: a class in place of a detector ended in an AttributeError, or in a word about regression."""
    with pytest.raises(ConfigurationError, match=r"a list of detectors.*\[Energy\(\), NearestNeighbours\(\)\]"):
        guard_of(detectors=wrong)
    with pytest.raises(ConfigurationError, match="two or more detectors"):
        Ensemble(wrong)


class Bounded(nn.Module):
    """Finite logits whatever the features are."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        features = self.body(x) / (x[:, :1] - 7).clamp(max=0)
        return torch.nan_to_num(self.head(features), nan=0.0, posinf=9.0, neginf=-9.0)


@pytest.mark.parametrize("rows_at_once", [5, 200])
def test_features_that_are_no_numbers_refuse_their_row_alone(rows_at_once):
    torch.manual_seed(0)
    guard = Guard.calibrate(
        Bounded().eval(), CALIBRATION[0].clamp(max=6.5), InputSpec((6,)), fit=FIT[0].clamp(max=6.5), alpha=0.05
    )
    x = rows(rows_at_once, 3)[0].clamp(max=6.5)
    before = guard(x)
    x[2, 0] = 7.5
    decision = guard(x)
    assert decision.reasons[2] == ("model: output not finite",) and not decision.accepted[2]
    others = torch.arange(rows_at_once) != 2
    assert torch.equal(decision.accepted[others], before.accepted[others])
    assert guard.attackable()(x)[2].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("caps", [{"max_rows": 7}, {"max_bytes": 7 * 24}])
def test_caps_on_requests_are_no_reason_to_refuse_calibration_rows(caps):
    spec = InputSpec((6,), low=-30.0, high=30.0, **caps)
    guard = guard_of(spec=spec)
    assert guard.facts.refused_n == 0 and guard.facts == dataclasses.replace(guard_of().facts, refused_n=0)
    assert guard(TEST[:8]).reasons[0] != () and guard(TEST[:7]).accepted.any()
    assert guard.detection(strange(30)).value == 1
