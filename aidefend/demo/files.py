"""Chapter 5: the model file. Signed and verified; one flipped byte and one malicious pickle are refused."""

import tempfile
from pathlib import Path

import safetensors.torch

from aidefend._core.errors import UnsafeArtifact
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.random import secure_uniform
from aidefend.artifacts import Manifest, safe_load
from aidefend.audit import SummaryRow
from aidefend.demo.world import Chapter, Tell, World

# A pickle that would create a file when loaded: os.system by its Unix name, written by hand. Never executed here.
_MALICIOUS = b"cposix\nsystem\n(S'touch aidefend-was-executed'\ntR."


def files(world: World, tell: Tell) -> Chapter:
    """Save the model, sign a manifest, load it; then tamper in two ways."""
    model = world.models["guarded"]
    key = secure_uniform(8).tobytes()
    with tempfile.TemporaryDirectory(prefix="aidefend-") as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
        manifest = Manifest.of(path).sign(key)
        manifest.verify(path, key=key)
        loaded = safe_load(path, expect=model.state_dict(), manifest=manifest, key=key)
        same = all(bool((loaded[name] == value).all()) for name, value in model.state_dict().items())
        tell(f"model saved, manifest verified, {len(loaded)} tensors loaded and equal: {same}")
        flipped = _refusal_of_flipped(path, manifest, key)
        tell(f"one flipped byte: {flipped}")
        pickle_path = Path(folder) / "model.pt"
        pickle_path.write_bytes(_MALICIOUS)
        executed = _refusal(pickle_path)
        tell(f"malicious pickle: {executed}")
        world.facts["malicious digest"] = Manifest.of(pickle_path).files[0].sha256
        safe = not (Path(folder) / "aidefend-was-executed").exists() and not Path("aidefend-was-executed").exists()
    findings = [
        Finding("artifacts.round_trip", "The signed model loads unchanged", value=same),
        _refused("artifacts.flipped_byte_refused", "One flipped byte is refused", flipped),
        _refused(
            "artifacts.malicious_pickle_refused",
            "A malicious pickle is refused, nothing executed",
            executed if safe else "",
        ),
    ]
    row = SummaryRow(
        "tampered or malicious files",
        "one flipped byte; a pickle that runs a command",
        "not run here: pickle.load executes what the file names",
        "both refused before loading" if flipped and executed and safe else "NOT REFUSED",
        "a signature shows who signed, not that the weights are harmless",
    )
    return Chapter("Model files", f"{_TEXT}\n\n{flipped}\n\n{executed}", (row,), Evidence(findings))


_TEXT = "A model file is data from a stranger: pickles execute code, and one changed byte changes what the model says."


def _refusal_of_flipped(path: Path, manifest: Manifest, key: bytes) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    try:
        manifest.verify(path, key=key)
    except UnsafeArtifact as error:
        return str(error).replace(str(path.parent), "")
    return ""


def _refusal(path: Path) -> str:
    try:
        safe_load(path)
    except UnsafeArtifact as error:
        return str(error).replace(str(path.parent), "")
    return ""


def _refused(identity: str, title: str, reason: str) -> Finding:
    severity = Severity.INFO if reason else Severity.CRITICAL
    return Finding(identity, title, severity, bool(reason), setting={"reason": reason})
