"""What must load, bit for bit: state dicts of every layer, optimizer and scheduler, every number type and container."""

import inspect
import warnings
from collections import Counter, OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from aidefend import ConfigurationError, UnsafeArtifact
from aidefend.artifacts import Limits, inspect_artifact, safe_load
from aidefend.artifacts.limits import DTYPES

HIDDEN = {"Container", "Module", "Buffer"}  # Container: deprecated alias of Module
RANKS = (1, 2, 3)
CONVOLUTION = {"in_channels": 2, "out_channels": 4, "kernel_size": 3}
ATTENTION = {"d_model": 4, "nhead": 2, "dim_feedforward": 8}
ARGUMENTS = {
    **{name: {"normalized_shape": 4} for name in ("LayerNorm", "RMSNorm")},
    **{f"{kind}{n}d": {"num_features": 4} for kind in ("BatchNorm", "InstanceNorm") for n in RANKS},
    **{
        f"{kind}{n}d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3}
        for kind in ("Conv", "ConvTranspose")
        for n in RANKS
    },
    **{f"LazyConv{kind}{n}d": {"out_channels": 4, "kernel_size": 3} for kind in ("", "Transpose") for n in RANKS},
    **{name: {"input_size": 3, "hidden_size": 2} for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")},
    **{
        name: {"d_model": 4, "nhead": 2, "dim_feedforward": 8}
        for name in ("TransformerEncoderLayer", "TransformerDecoderLayer")
    },
    **{f"{kind}Pool{n}d": {"kernel_size": 2} for kind in ("Max", "Avg") for n in RANKS},
    **{f"LPPool{n}d": {"norm_type": 2, "kernel_size": 2} for n in RANKS},
    **{f"Adaptive{kind}Pool{n}d": {"output_size": 2} for kind in ("Max", "Avg") for n in RANKS},
    **{f"{kind}Pad{n}d": {"padding": 1} for kind in ("Reflection", "Replication", "Zero", "Circular") for n in RANKS},
    **{f"ConstantPad{n}d": {"padding": 1, "value": 0.5} for n in RANKS},
    **{name: {"num_embeddings": 5, "embedding_dim": 2} for name in ("Embedding", "EmbeddingBag")},
    "AdaptiveLogSoftmaxWithLoss": {"in_features": 4, "n_classes": 6, "cutoffs": [2, 4]},
    **{f"MaxUnpool{n}d": {"kernel_size": 2} for n in RANKS},
    "ChannelShuffle": {"groups": 2},
    "RNNBase": {"mode": "LSTM", "input_size": 3, "hidden_size": 2},
    "RNNCellBase": {"input_size": 3, "hidden_size": 2, "bias": True, "num_chunks": 4},
    "SyncBatchNorm": {"num_features": 4},
    "Bilinear": {"in1_features": 2, "in2_features": 3, "out_features": 2},
    "CrossMapLRN2d": {"size": 2},
    "Fold": {"output_size": 4, "kernel_size": 2},
    "FractionalMaxPool2d": {"kernel_size": 2, "output_size": 2},
    "FractionalMaxPool3d": {"kernel_size": 2, "output_size": 2},
    "GroupNorm": {"num_groups": 2, "num_channels": 4},
    "LazyLinear": {"out_features": 2},
    "Linear": {"in_features": 3, "out_features": 2},
    "LinearCrossEntropyLoss": {"in_features": 3, "num_classes": 2},
    "LocalResponseNorm": {"size": 2},
    "MultiheadAttention": {"embed_dim": 4, "num_heads": 2},
    "NLLLoss2d": {},
    "PixelShuffle": {"upscale_factor": 2},
    "PixelUnshuffle": {"downscale_factor": 2},
    "Threshold": {"threshold": 0.1, "value": 0.0},
    "Transformer": {"d_model": 4, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 8},
    "Unflatten": {"dim": 1, "unflattened_size": (2, 2)},
    "Unfold": {"kernel_size": 2},
}
INPUTS = {"LazyLinear": (2, 3), **{f"LazyConv{k}{n}d": (1, 2, *[5] * n) for k in ("", "Transpose") for n in RANKS}}
INPUTS |= {f"Lazy{kind}Norm{n}d": (2, 3, *[4] * n) for kind in ("Batch", "Instance") for n in RANKS}
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
LAYERS = sorted(
    name
    for name, kind in vars(nn).items()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and name not in HIDDEN
)


def make_layer(name: str) -> nn.Module:
    kind = getattr(nn, name)
    if name in ("TransformerEncoder", "TransformerDecoder"):
        inner = getattr(nn, f"{name}Layer")(d_model=4, nhead=2, dim_feedforward=8)
        return kind(inner, num_layers=1)
    if name in ("ModuleDict", "ParameterDict"):
        return kind({"a": nn.Linear(1, 1) if name == "ModuleDict" else nn.Parameter(torch.ones(2))})
    if name in ("ModuleList", "ParameterList", "Sequential"):
        part = nn.Parameter(torch.ones(2)) if name == "ParameterList" else nn.Linear(1, 1)
        return kind(part) if name == "Sequential" else kind([part])
    if name in ("DataParallel", "TripletMarginWithDistanceLoss"):
        return kind(nn.Linear(1, 1)) if name == "DataParallel" else kind()
    layer = kind(**ARGUMENTS.get(name, {}))
    if name in INPUTS:
        layer(torch.ones(INPUTS[name]))
    return layer


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and one.requires_grad == other.requires_grad
        assert one.stride() == other.stride() or 0 in one.shape
        plain = [value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for value in (one, other)]
        assert torch.equal(*[value.view(torch.uint8) for value in plain])
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert getattr(one, "__dict__", None) == getattr(other, "__dict__", None)
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, set):
        assert one == other
    else:
        assert repr(one) == repr(other)


def round_trip(value, path, **options):
    torch.save(value, path)
    loaded = safe_load(path, **options)
    assert_same(value, loaded)
    assert "artifacts.accepted" in inspect_artifact(path)
    return loaded


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_dict_of_each_layer_loads(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = make_layer(name)
    loaded = round_trip(layer.state_dict(), tmp_path / "model.pt", expect=layer)
    layer.load_state_dict(loaded)


def step(name: str) -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=name == "SparseAdam"), nn.Linear(3, 2, bias=False))
    weights = [model[0].weight] if name == "SparseAdam" else list(model.parameters())
    kind = getattr(torch.optim, name)
    optimizer = kind(weights, lr=0.01) if "lr" in inspect.signature(kind).parameters else kind(weights)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.tensor([0, 1, 3])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_dict_of_each_optimizer_loads(name, tmp_path):
    optimizer = step(name)
    loaded = round_trip(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.load_state_dict(loaded)


def test_schedulers_scalers_and_averaged_models_load(tmp_path):
    optimizer = step("SGD")
    schedulers = {
        "multi": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]),
        "one": torch.optim.lr_scheduler.OneCycleLR(step("SGD"), max_lr=0.1, total_steps=5),
        "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        "scaler": torch.amp.GradScaler("cpu"),
        "average": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1)),
    }
    round_trip({name: item.state_dict() for name, item in schedulers.items()}, tmp_path / "all.pt")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_number_type_loads(dtype, tmp_path):
    raw = torch.arange(64, dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    value = raw.view(dtype)
    round_trip({"w": value, "empty": value[:0], "scalar": value[0]}, tmp_path / "model.pt")


def test_nested_checkpoints_and_every_plain_value_load(tmp_path):
    model = nn.BatchNorm1d(2)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "epoch": 3,
        "best": float("inf"),
        "loss": float("nan"),
        "negative zero": -0.0,
        "big": -(2**70),
        "complex": complex(1, -2),
        "bytes": b"\x00\xff",
        "empty bytes": bytearray(),
        "buffer": bytearray(b"ab"),
        "set": {1, "a", None},
        "counter": Counter({1: 2}),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "tuple": (1, [2, (3,)], {}),
        "flag": True,
        "none": None,
        "text": "ü\n",
        "numbers as keys": {0: "a", -1: "b"},
        "ordered": OrderedDict(a=1),
    }
    round_trip(checkpoint, tmp_path / "checkpoint.ckpt")


def test_views_ties_parameters_and_lazy_bits_load(tmp_path):
    base = torch.arange(24.0)
    shared = torch.ones(3)
    complex_values = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "transposed": base.view(4, 6).t(),
        "strided": base[3::2],
        "row of one": torch.arange(5).expand(1, 5),
        "diagonal": torch.eye(3).diagonal(),
        "tied": shared,
        "tied too": shared,
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
        "with gradient": torch.ones(2, requires_grad=True),
        "conj": complex_values.conj(),
        "negative": complex_values.clone().conj().imag,
        "channels last": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "zero size": torch.empty(0, 3, 2),
        "0-dim": torch.tensor(1.5),
    }
    loaded = round_trip(state, tmp_path / "model.pt")
    loaded["tied"][0] = 7.0
    assert loaded["tied too"][0] == 7.0
    assert loaded["conj"].is_conj() and loaded["negative"].is_neg()


def test_many_tensors_need_a_wide_directory(tmp_path):
    round_trip({f"{n}": torch.tensor(n) for n in range(1_000)}, tmp_path / "model.pt")


def test_safetensors_of_the_library_load(tmp_path):
    path = tmp_path / "model.safetensors"
    kinds = [kind for kind in DTYPES if kind != torch.complex128 and "fnuz" not in str(kind)]
    raw = torch.arange(16, dtype=torch.uint8)
    state = {str(kind): (raw % 2 if kind == torch.bool else raw.clone()).view(kind) for kind in kinds}
    state |= {"empty": torch.empty(0, 3), "0-dim": torch.tensor(2.0), "": torch.ones(1)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    loaded = safe_load(path)
    assert set(loaded) == set(state)
    for name, value in state.items():
        assert_same(value, loaded[name])
    storages = {value.untyped_storage().data_ptr() for value in loaded.values() if value.numel()}
    assert len(storages) == len(state) - 1
    safetensors.torch.save_file({}, path)
    assert safe_load(path) == {}


def test_values_that_are_not_finite_load_only_on_request(tmp_path):
    path = tmp_path / "model.pt"
    state = {"mask": torch.tensor([0.0, -float("inf")]), "nan": torch.tensor([float("nan")], dtype=torch.bfloat16)}
    torch.save(state, path)
    with pytest.raises(UnsafeArtifact, match=r"tensor mask.*finite=False"):
        safe_load(path)
    assert_same(state, safe_load(path, limits=Limits(finite=False)))


def test_compressed_archives_load_only_on_request(tmp_path):
    from tests.artifacts.hostile_files import deflate
    from tests.artifacts.hostile_pickles import build_zip, honest, state, tensor

    entries = honest(state(tensor()))
    entries[2] = entries[2]._replace(packed=deflate(entries[2].data), method=8)
    (tmp_path / "model.pt").write_bytes(build_zip(entries))
    with pytest.raises(UnsafeArtifact, match="max_compression_ratio"):
        safe_load(tmp_path / "model.pt")
    loaded = safe_load(tmp_path / "model.pt", limits=Limits(max_compression_ratio=8))
    assert torch.equal(loaded["weight"], torch.zeros(4))


def test_loading_leaves_no_trace(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with torch.device("meta"):
        loaded = safe_load(tmp_path / "model.pt")
    assert loaded["w"].device.type == "cpu"
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert torch.serialization._serialization_tls.map_location is None


def test_expect_demands_keys_shapes_and_types(tmp_path):
    path = tmp_path / "model.pt"
    model = nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "epoch": 3, "name": "a"}, path)
    flat = {"weight": (2, 3), "bias": ((2,), torch.float32)}
    good = [
        {"model": model.state_dict(), "epoch": int, "name": str},
        {"model": flat, "epoch": 0, "name": object},
        {"model": dict, "epoch": int, "name": "b"},
    ]
    for expect in good:
        assert safe_load(path, expect=expect)["epoch"] == 3
    bad = {
        "missing .'scale'": {"model": {**flat, "scale": (1,)}, "epoch": int, "name": str},
        "unexpected .'bias'": {"model": {"weight": (2, 3)}, "epoch": int, "name": str},
        r"shape \(3, 2\)": {"model": {"weight": (3, 2), "bias": (2,)}, "epoch": int, "name": str},
        "torch.float64": {"model": {"weight": ((2, 3), torch.float64), "bias": (2,)}, "epoch": int, "name": str},
        "a dict": {"model": flat, "epoch": {"w": (1,)}, "name": str},
        "a tensor": {"model": flat, "epoch": (1,), "name": str},
        "str, got entry epoch": {"model": flat, "epoch": str, "name": str},
        "float, got entry epoch": {"model": flat, "epoch": 0.5, "name": str},
    }
    for words, expect in bad.items():
        with pytest.raises(UnsafeArtifact, match=words):
            safe_load(path, expect=expect)
    for expect in (3, {"model": flat, "epoch": int, "name": [1.5]}):
        with pytest.raises(ConfigurationError, match="Expected"):
            safe_load(path, expect=expect)
    torch.save(model.state_dict(), path)
    with pytest.raises(UnsafeArtifact, match="another model"):
        safe_load(path, expect=nn.Linear(3, 3))


def test_malformed_arguments_are_named():
    for call, words in [
        (lambda: safe_load(b"bytes"), "path to be a file name"),
        (lambda: safe_load("x", limits={}), "limits to be Limits"),
        (lambda: safe_load("x", key=b"k" * 32), "a manifest with the key"),
        (lambda: safe_load("x", manifest="manifest.json"), "manifest to be a Manifest"),
        (lambda: safe_load("x", expect=3), "expect to be a module"),
        (lambda: Limits(dtypes=3), "dtypes"),
        (lambda: Limits(max_file_bytes=0), "max_file_bytes"),
        (lambda: Limits(max_compression_ratio=0.5), "max_compression_ratio"),
        (lambda: Limits(links="follow"), "links"),
        (lambda: Limits(root=3), "root"),
        (lambda: Limits(dtypes={torch.qint8}), "dtypes"),
        (lambda: Limits(dtypes=torch.float32), "dtypes"),
        (lambda: Limits(min_torch=(2, 5)), "min_torch"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            call()


def test_an_old_torch_is_refused_before_it_parses(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(UnsafeArtifact, match=r"torch >= 2\.10"):
        safe_load(tmp_path / "model.pt")
    monkeypatch.setattr(torch, "__version__", "2.11.0a0")
    with pytest.raises(UnsafeArtifact, match=r"torch >= 3\.0"):
        safe_load(tmp_path / "model.pt", limits=Limits(min_torch=(3, 0)))
    assert safe_load(tmp_path / "model.pt")["w"].sum() == 2


def test_a_torch_that_builds_something_else_is_caught(tmp_path, monkeypatch):
    """The planted violation: a loader that disagrees with the checks is noticed."""
    path = tmp_path / "model.pt"
    honest = {"w": torch.arange(4.0), "n": 1, "o": OrderedDict(a=1)}
    torch.save(honest, path)
    lies = [
        {**honest, "w": torch.arange(4.0) + 1},
        {**honest, "w": torch.arange(5.0)[:4]},
        {**honest, "w": torch.arange(4)},
        {**honest, "n": True},
        {**honest, "o": {"a": 1}},
        {**honest, "extra": 1},
        [honest],
    ]
    for lie in lies:
        monkeypatch.setattr(torch, "load", lambda *_, lie=lie, **__: lie)
        with pytest.raises(UnsafeArtifact, match="two parsers"):
            safe_load(path)
