"""A guard on disk: the same verdicts after loading, and a refusal of everything that is not the same."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend._core.errors import AidefendError
from aidefend.validate import (
    BitDepth,
    Energy,
    Guard,
    InputSpec,
    KeyedNoise,
    LabelOnly,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    NearestNeighbours,
    Purify,
    RelativeMahalanobis,
    ReverseSigmoid,
    Rounded,
    Tempered,
    TopK,
)
from tests.validate.small_world import Recorder, model, rows, strange

FIT, CALIBRATION = rows(200, 1), rows(300, 2)
TEST = torch.cat([rows(20, 3)[0], strange(3)])
DETECTORS = [Energy(), MaxLogit(), MaxSoftmax(), NearestNeighbours(k=5), Mahalanobis(), RelativeMahalanobis()]


def guard_of(detectors=DETECTORS, **options):
    return Guard.calibrate(model(), CALIBRATION, detectors=detectors, alpha=0.05, fit=FIT, **options)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "guard.safetensors"
    guard_of(mode="monitor", output=TopK(2), spec=InputSpec((6,), low=-15, high=15)).save(path)
    return path


def rewritten(path, change):
    """The file again, with a changed header and arrays."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["guard"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, arrays)
    safetensors.torch.save_file(arrays, path, {"guard": json.dumps(header)})


def test_a_loaded_guard_decides_the_same(saved, tmp_path):
    first = guard_of(mode="monitor", output=TopK(2), spec=InputSpec((6,), low=-15, high=15))
    second = Guard.load(saved, model())
    a, b = first(TEST), second(TEST)
    assert a.report.to_dict() == b.report.to_dict() and a.reasons == b.reasons
    torch.testing.assert_close(a.outputs, b.outputs)
    assert first.facts == second.facts and first.spec == second.spec and second.mode == "monitor"
    second.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("output", [None, LabelOnly(), TopK(1), Rounded(1), Tempered(3.0), ReverseSigmoid(0.5)])
def test_outputs_are_kept(tmp_path, output):
    guard_of([Energy()], output=output).save(tmp_path / "guard")
    assert Guard.load(tmp_path / "guard", model()).output == output


def test_a_key_is_not_in_the_file_and_must_be_given_again(tmp_path):
    noisy = KeyedNoise(b"a very secret key", scale=0.25)
    first = guard_of([Energy()], output=noisy)
    first.save(tmp_path / "guard")
    assert noisy.key not in (tmp_path / "guard").read_bytes()
    second = Guard.load(tmp_path / "guard", model(), output=KeyedNoise(b"a very secret key", scale=0.25))
    torch.testing.assert_close(second(TEST).outputs, first(TEST).outputs, rtol=0, atol=0, equal_nan=True)
    for other in (None, KeyedNoise(bytes(16), scale=0.25), KeyedNoise(noisy.key, scale=0.5), LabelOnly()):
        with pytest.raises(ConfigurationError, match="with the key and the settings"):
            Guard.load(tmp_path / "guard", model(), output=other)


def test_an_output_beside_the_one_in_the_file_is_refused(saved):
    with pytest.raises(ConfigurationError, match="Leave output= out"):
        Guard.load(saved, model(), output=TopK(2))


def test_other_weights_are_refused(saved):
    other = model()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-6
    with pytest.raises(ConfigurationError, match="the weights that the guard was calibrated for"):
        Guard.load(saved, other)


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)),
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        model().double(),
        lambda x: x,
    ],
)
def test_another_model_is_refused(saved, other):
    with pytest.raises(ConfigurationError, match="the model that the guard was calibrated for"):
        Guard.load(saved, other)


def test_a_lost_collaborator_is_refused(tmp_path):
    recorder = Recorder()
    guard_of([Energy()], **recorder.all(), resource="model:digits").save(tmp_path / "guard")
    with pytest.raises(ConfigurationError, match="Pass policy=, log=: without it"):
        Guard.load(tmp_path / "guard", model(), budget=recorder, metrics=recorder)
    loaded = Guard.load(tmp_path / "guard", model(), **recorder.all())
    loaded(TEST, principal="team-a")
    assert recorder.request == ("team-a", "predict", "model:digits")


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path):
    class Own(NearestNeighbours):
        pass

    class Fitted:
        name, uses_features = "own", False

        def fit(self, features, logits, labels=None):
            return self

        def score(self, features, logits):
            return logits[:, 0]

    with pytest.raises(ConfigurationError, match="detectors of this package"):
        guard_of([Fitted()]).save(tmp_path / "guard")
    with pytest.raises(ConfigurationError, match="output of this package"):
        guard_of([Energy()], output=lambda logits: logits).save(tmp_path / "guard")
    with pytest.raises(AidefendError, match="existing folder"):
        guard_of([Energy()]).save(tmp_path / "none" / "guard")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"{}", b"\xff" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "guard").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"written by Guard\.save"):
        Guard.load(tmp_path / "guard", model())
    with pytest.raises(ConfigurationError, match=r"written by Guard\.save"):
        Guard.load(tmp_path / "none", model())


def test_a_file_without_the_header_is_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "guard")
    with pytest.raises(ConfigurationError, match=r"written by Guard\.save"):
        Guard.load(tmp_path / "guard", model())


def _schema(header, _):
    header["schema"] = "aidefend.guard/9"


def _mode(header, _):
    header["mode"] = "off"


def _alpha(header, _):
    header["facts"]["alpha"] = 0.0


def _detector(header, _):
    header["detectors"][3][0] = "Popen"


def _settings(header, _):
    header["detectors"][3][1] = {"k": 10**6}


def _extra(header, _):
    header["facts"]["more"] = 1


def _classes(header, _):
    header["facts"]["num_classes"] = "three"


def _dtype(header, _):
    header["facts"]["logits_dtype"] = "nn"


def _layer(header, _):
    header["facts"]["layer"] = "nine"


def _output(header, _):
    header["output"] = ["exec", {}]


def _spec(header, _):
    header["spec"]["shape"] = []


def _not_finite(_, arrays):
    arrays["calibration/scores"][0, 0] = float("nan")


def _missing(_, arrays):
    del arrays["calibration/scores"]


def _falling(_, arrays):
    arrays["calibration/slopes"] = -arrays["calibration/slopes"]


def _column(_, arrays):
    arrays["calibration/scores"] = arrays["calibration/scores"][:, :2].clone()


def _bank(_, arrays):
    arrays["detector-3/bank"] = arrays["detector-3/bank"][:0].clone()


def _stranger(_, arrays):
    arrays["detector-0/code"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change",
    [
        *(_schema, _mode, _alpha, _detector, _settings, _extra, _classes, _dtype, _layer, _output, _spec),
        *(_not_finite, _missing, _falling, _column, _bank, _stranger),
    ],
    ids=lambda change: change.__name__,
)
def test_a_damaged_guard_is_refused_before_it_guards(saved, change):
    rewritten(saved, change)
    with pytest.raises(ConfigurationError):
        Guard.load(saved, model())


def test_the_rewriting_above_changes_nothing_by_itself(saved):
    rewritten(saved, lambda *_: None)
    assert Guard.load(saved, model())(TEST).report.keep.any()


def test_other_restorations_before_the_same_weights_are_another_model(tmp_path):
    """Planted violation: a guard calibrated behind five bits was loaded behind one."""

    def purified(bits):
        return Purify([BitDepth(bits, (-30.0, 30.0)), torch.abs]).around(model()).eval()

    spec = InputSpec((6,), low=-30.0, high=30.0)
    Guard.calibrate(purified(5), CALIBRATION, spec, [Energy()], 0.05, FIT).save(tmp_path / "guard")
    Guard.load(tmp_path / "guard", purified(5)).close()
    for other in (purified(6), model(), Purify([BitDepth(5, (-30.0, 30.0))]).around(model()).eval()):
        with pytest.raises(ConfigurationError, match="modules or shapes differ"):
            Guard.load(tmp_path / "guard", other)


@pytest.mark.parametrize("change", [("facts", "num_classes", 10**12), ("spec", "shape", [10**12])])
def test_sizes_that_a_file_claims_take_no_memory(change, tmp_path):
    guard_of([Energy()]).save(tmp_path / "guard")
    with safetensors.safe_open(tmp_path / "guard", "pt") as file:
        header = json.loads(file.metadata()["guard"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    part, name, value = change
    header[part][name] = value
    safetensors.torch.save_file(arrays, tmp_path / "guard", {"guard": json.dumps(header)})
    if part == "facts":
        with pytest.raises(ConfigurationError, match="num_classes"):
            Guard.load(tmp_path / "guard", model())
    else:  # rules that no request satisfies
        assert not Guard.load(tmp_path / "guard", model())(TEST).accepted.any()
