"""What a file is, told from its bytes; names and extensions are claims that are only compared."""

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

from aidefend._core.evidence import Severity
from aidefend.artifacts.files import unsafe
from aidefend.artifacts.global_names import find_globals, is_pickle


class Format(NamedTuple):
    """A kind of file: its name, whether safe_load reads it, why it is refused, the safe way out, how urgent."""

    name: str
    loadable: bool = False
    reason: str = ""
    cure: str = ""
    severity: Severity = Severity.HIGH


_STATE_DICT = "In a sandbox, load it where it was made and save model.state_dict() with torch.save or safetensors"
_UNPACK = "Unpack it in a sandbox and pass the weights file inside"

SAFETENSORS = Format("safetensors", loadable=True)
ZIP = Format("zip", loadable=True)
CHECKPOINT = Format("torch checkpoint", loadable=True)
EMPTY = Format("empty", reason="it holds no bytes", cure="Fetch it again", severity=Severity.MEDIUM)
UNKNOWN = Format("unknown", reason="nothing recognised it", cure="Pass safetensors or a torch.save checkpoint")
TEXT = Format("text", reason="it is text, not weights", cure="Pass the weights file", severity=Severity.INFO)
PICKLE = Format("pickle", reason="unpickling executes code that the file names", cure=_STATE_DICT)
LEGACY = Format(
    "legacy torch pickle",
    reason="torch before 1.6 wrote bare pickles without checksums or lengths",
    cure="In a sandbox: torch.save(torch.load(path, weights_only=True), new_path)",
)
TORCHSCRIPT = Format("torchscript", reason="TorchScript archives hold programs", cure=_STATE_DICT)
PACKAGE = Format("torch.package", reason="torch.package archives hold Python source", cure=_STATE_DICT)
_FROM_NUMPY = "Save torch.from_numpy(array) as safetensors"
NUMPY = Format("numpy", reason="numpy files are not read here", cure=_FROM_NUMPY, severity=Severity.LOW)
NUMPY_OBJECTS = Format("numpy object array", reason="object arrays are pickles inside", cure=_STATE_DICT)
NUMPY_ARCHIVE = Format("numpy archive", reason="npz members may be object arrays", cure="Save tensors as safetensors")
NESTED = Format("archive in an archive", reason="an inner archive escapes every check of the outer one", cure=_UNPACK)
ZIP_OTHER = Format("zip archive", reason="it is no torch checkpoint (no data.pkl)", cure=_UNPACK)
_ARCHIVE = "an archive may hold anything, in any nesting"
_PROGRAM = "it is a program"

_MAGIC: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"7z\xbc\xaf\x27\x1c", Format("7z archive", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"\x1f\x8b", Format("gzip", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"BZh", Format("bzip2", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"\xfd7zXZ\x00", Format("xz", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Format("zstandard", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"\x04\x22\x4d\x18", Format("lz4", reason=_ARCHIVE, cure=_UNPACK)),
    (0, b"Rar!", Format("rar archive", reason=_ARCHIVE, cure=_UNPACK)),
    (
        257,
        b"ustar",
        Format("tar archive", reason="tar checkpoints of old torch are pickles", cure=_STATE_DICT),
    ),
    (0, b"PK\x05\x06", Format("zip archive", reason="it has no members", cure="Fetch it again")),
    (0, b"PK\x07\x08", Format("split zip archive", reason=_ARCHIVE, cure=_UNPACK)),
    (
        0,
        b"\x89HDF\r\n\x1a\n",
        Format("hdf5", reason="Keras files may hold code (Lambda layers)", cure=_STATE_DICT),
    ),
    (0, b"GGUF", Format("gguf", reason="it is not a torch format", cure="Convert it with its own tools")),
    (4, b"TFL3", Format("tflite", reason="it is not a torch format", cure="Convert it with its own tools")),
    (0, b"\x7fELF", Format("program", reason=_PROGRAM, cure="Remove it")),
    (0, b"MZ", Format("program", reason=_PROGRAM, cure="Remove it")),
    (0, b"\xca\xfe\xba\xbe", Format("program", reason=_PROGRAM, cure="Remove it")),
    (0, b"\xcf\xfa\xed\xfe", Format("program", reason=_PROGRAM, cure="Remove it")),
    (0, b"#!", Format("script", reason=_PROGRAM, cure="Remove it")),
)
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
_TEXT_NAME = re.compile(rb"(?:^|[^\w])?[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")
_SHOWN_NAMES = 3
_CODE_SUFFIXES = (".py", ".pyc", ".sh", ".bat", ".ps1", ".js", ".so", ".dll", ".dylib", ".exe")
_CODE = Format(
    "code",
    reason="code beside a model runs with trust_remote_code=True",
    cure="Load the weights alone, never with trust_remote_code",
    severity=Severity.MEDIUM,
)
_ONNX = Format("onnx", reason="it is not a torch format", cure="Convert it with its own tools", severity=Severity.LOW)
_EXTENSIONS = {
    ".safetensors": SAFETENSORS,
    ".pt": ZIP,
    ".pth": ZIP,
    ".ckpt": ZIP,
    ".bin": ZIP,
    ".onnx": _ONNX,
}


def sniff(data: bytes) -> Format:
    """The format of a file, from its content alone."""
    if not data:
        return EMPTY
    if data[:4] == b"PK\x03\x04":
        return ZIP
    if data[:6] == b"\x93NUMPY":
        return NUMPY_OBJECTS if re.search(rb"'descr'[^}]*\|?O[0-9]*'", data[:65536]) else NUMPY
    for offset, magic, found in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return found
    if data[0] == 0x80 and len(data) > 1 and data[1] <= 5:
        return LEGACY if data[2:14] == _LEGACY_MAGIC or _LEGACY_MAGIC in data[:64] else PICKLE
    if len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return SAFETENSORS
    return _sniff_text(data)


def classify_zip(names: Iterable[str]) -> Format:
    """Which kind of zip archive has these members."""
    inner = [name.partition("/")[2] for name in names]
    if any(part in ("constants.pkl", "model.json") or part.startswith("code/") for part in inner):
        return TORCHSCRIPT
    if any(part in (".data/extern_modules", ".data/python_version") for part in inner):
        return PACKAGE
    if any(name.endswith(".npy") for name in names):
        return NUMPY_ARCHIVE
    if any(re.search(r"\.(zip|tar|gz|tgz|7z|npz|pt|pth|bz2|xz|rar|keras)$", name, re.IGNORECASE) for name in names):
        return NESTED
    return ZIP if "data.pkl" in inner else ZIP_OTHER


def check_extension(path: str, found: Format) -> None:
    """A file that claims one format and holds another is refused: other tools go by the name."""
    claimed = _EXTENSIONS.get(PurePath(path).suffix.lower())
    if claimed is not None and found.loadable and claimed != found:
        rule = f"the content that {PurePath(path).suffix} names"
        cure = "Rename the file if you trust its origin; tools that go by the name err"
        raise unsafe(rule, "content", found.name, cure)


def describe_unreadable(path: str, found: Format) -> Format:
    """The format of a file that is not read, also told by its name where the bytes say little."""
    suffix = PurePath(path).suffix.lower()
    if suffix in _CODE_SUFFIXES:
        return _CODE
    if found in (UNKNOWN, TEXT) and suffix == ".onnx":
        return _ONNX
    return UNKNOWN if found == TEXT and suffix in _EXTENSIONS else found


def refuse_format(found: Format, path: str, data: bytes = b"") -> Exception:
    """The error for a format that is never read; where the format can name code, it says which."""
    names = find_globals(data)[:_SHOWN_NAMES] if found in (PICKLE, LEGACY) else []
    naming = f" that names {', '.join(names)}" if names else ""
    cure = f"{found.cure}. Nothing was executed"
    content = f"{found.name}{naming} in {path}: {found.reason}"
    return unsafe("safetensors or a torch.save checkpoint", "format", content, cure)


def _sniff_text(data: bytes) -> Format:
    """Protocol 0 pickles are text; so only text in which no line imports a name counts as text."""
    head = data[:65536]
    if _TEXT_NAME.match(head) or (_TEXT_NAME.search(head) and data.rstrip()[-1:] == b"."):
        return PICKLE
    if is_pickle(data):
        return PICKLE
    control = set(range(32)) - {9, 10, 12, 13}
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return UNKNOWN
    return UNKNOWN if control & set(head) else TEXT
