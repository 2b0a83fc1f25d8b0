"""Hostile pickles, written opcode by opcode, and a writer of archives that can lie about its members."""

import struct
import zlib
from typing import NamedTuple

_GADGETS = """
posix.system nt.system os.system os.popen subprocess.Popen subprocess.call pty.spawn commands.getoutput builtins.eval
builtins.exec builtins.compile builtins.open builtins.__import__ builtins.getattr builtins.map __builtin__.eval
__builtin__.apply __builtin__.file runpy._run_code pip.main pip._internal.main timeit.timeit
ssl.get_server_certificate numpy.testing._private.utils.runstring idlelib.pyshell.ModifiedInterpreter
idlelib.autocomplete.AutoComplete lib2to3.pgen2.grammar.Grammar.loads cProfile.run profile.run trace.Trace.run
doctest.debug_script ensurepip._run_pip code.InteractiveInterpreter code.interact
asyncio.unix_events._UnixSubprocessTransport._start bdb.Bdb.run pdb.run torch.utils.collect_env.run
torch.utils.bottleneck.__main__.run_cprofile torch.jit.unsupported_tensor_ops.execWrapper
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
torch.utils._config_module.ConfigModule.load_config torch.utils.data.datapipes.utils.decoder.basichandlers
numpy.f2py.crackfortran.getlincoef operator.methodcaller operator.attrgetter operator.itemgetter functools.partial
functools.reduce distutils.file_util.write_file io.FileIO io.open urllib.request.urlopen logging.FileHandler
logging.config.fileConfig cloudpickle.cloudpickle._make_function types.CodeType types.FunctionType
pkgutil.resolve_name uuid._get_command_stdout _osx_support._read_output _aix_support._read_cmd_output
imaplib.IMAP4_stream test.support.script_helper.assert_python_ok importlib.import_module marshal.loads torch.load
torch.hub.load torch.jit.load torch.package.PackageImporter torch.serialization.load torch.storage._load_from_bytes
joblib.load pandas.read_pickle numpy.load multiprocessing.util.spawnv_passfds zipimport.zipimporter pickle.loads
_pickle.loads dill.loads shutil.rmtree socket.create_connection ctypes.CDLL webbrowser.open platform.popen sys.exit
torch.multiprocessing.start_processes torch._utils._rebuild_wrapper_subclass torch._tensor._rebuild_from_type_v2
torch._utils._rebuild_parameter_with_state torch._utils._rebuild_device_tensor_from_numpy
torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor torch._utils._rebuild_meta_tensor_no_storage
torch.serialization._get_layout torch._utils._import_dotted_name torch.Tensor torch.nn.parameter.Parameter
torch.nn.modules.linear.Linear numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct
collections.defaultdict collections.abc.sys.modules collections.OrderedDict.fromkeys collections.namedtuple
torch.float32.__class__ torch._utils._rebuild_tensor
"""
GADGETS = tuple(_GADGETS.split())

HEAD = b"\x80\x02"
FLOAT = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


class Entry(NamedTuple):
    """A member of an archive; every field that is not None overrides what an honest writer would write."""

    name: bytes
    data: bytes
    local_name: bytes | None = None
    flags: int = 0
    method: int = 0
    crc: int | None = None
    size: int | None = None
    packed: bytes | None = None
    local_size: int | None = None
    mode: int = 0
    extra: bytes = b""
    comment: bytes = b""
    descriptor: bytes | None = None
    offset: int | None = None
    gap: bytes = b""


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def mkdir(marker: str) -> bytes:
    """A live payload: the folder `marker` appears if anything runs it."""
    return b"cposix\nmkdir\n" + text(marker) + b"\x85R"


def integer(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def storage(key: str = "0", count: int = 4, kind: bytes = FLOAT, location: str = "cpu") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text(location) + integer(count) + b"tQ"


def whole(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def tensor(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    stored: bytes | None = None,
    grad: bytes = b"\x89",
    hooks: bytes = HOOKS,
    extra: bytes = b"",
) -> bytes:
    parts = [stored or storage(), integer(offset), whole(shape), whole(stride), grad, hooks, extra]
    return REBUILD + b"(" + b"".join(parts) + b"tR"


def state(value: bytes, key: str = "weight") -> bytes:
    return HEAD + b"}" + text(key) + value + b"s."


def beside(value: bytes) -> bytes:
    """The value next to an honest tensor, so that no other rule is broken."""
    return HEAD + b"}" + text("honest") + tensor() + b"s" + text("value") + value + b"s."


def build_zip(entries: list[Entry], prefix: bytes = b"", suffix: bytes = b"", **end: int | bytes) -> bytes:
    """An archive as its entries say, honest or not."""
    out, central = bytearray(prefix), bytearray()
    for entry in entries:
        out += entry.gap
        packed = entry.data if entry.packed is None else entry.packed
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        local = entry.name if entry.local_name is None else entry.local_name
        offset = len(out) if entry.offset is None else entry.offset
        stated = size if entry.local_size is None else entry.local_size
        numbers = (20, entry.flags, entry.method, 0, 0, crc)
        out += struct.pack("<4s5H3L2H", b"PK\x03\x04", *numbers, len(packed), stated, len(local), len(entry.extra))
        out += local + entry.extra + packed + (entry.descriptor or b"")
        lengths = (len(entry.name), 0, len(entry.comment), 0, 0, entry.mode, offset)
        central += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, *numbers, len(packed), size, *lengths)
        central += entry.name + entry.comment
    count = int(end.get("count", len(entries)))
    comment = bytes(end.get("comment", b""))
    record = bytes(end.get("record", b""))
    disk = int(end.get("disk", 0))
    start = len(out) + int(end.get("shift", 0))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", disk, disk, count, count, len(central), start, len(comment))
    return bytes(out + central + record + tail + comment) + suffix


def honest(pickle: bytes, data: bytes = bytes(16)) -> list[Entry]:
    """The members of a minimal checkpoint: one storage of four floats."""
    return [
        Entry(b"model/data.pkl", pickle),
        Entry(b"model/byteorder", b"little"),
        Entry(b"model/data/0", data),
        Entry(b"model/version", b"3\n"),
    ]


def checkpoint(pickle: bytes, data: bytes = bytes(16)) -> bytes:
    return build_zip(honest(pickle, data))


def opcode_cases(marker: str) -> dict[str, tuple[bytes, str]]:
    """Pickles inside an otherwise honest checkpoint: name -> (pickle, words of the refusal)."""
    run = mkdir(marker)
    inner = b"(S'" + marker.encode() + b"'\nt"
    cases = {
        "reduce runs before the state dict": (HEAD + run + b"0}" + text("w") + tensor() + b"s.", "posix.mkdir"),
        "reduce as a value": (state(run), "posix.mkdir"),
        "INST": (state(b"(" + text(marker) + b"iposix\nmkdir\n"), "INST"),
        "OBJ": (state(b"(cposix\nmkdir\n" + text(marker) + b"o"), "posix.mkdir"),
        "OBJ of an allowed name": (state(b"(ccollections\nOrderedDict\no"), "OBJ"),
        "OBJ and POP": (HEAD + b"(ccollections\nOrderedDict\no0}.", "OBJ"),
        "NEWOBJ": (state(b"ccollections\nOrderedDict\n)\x81"), "NEWOBJ"),
        "NEWOBJ_EX": (state(b"ccollections\nOrderedDict\n)}\x92"), "NEWOBJ_EX"),
        "STACK_GLOBAL": (state(text("posix") + text("mkdir") + b"\x93" + inner + b"R"), "STACK_GLOBAL"),
        "STACK_GLOBAL dotted": (state(text("numpy") + text("x.os.system") + b"\x93)R"), "STACK_GLOBAL"),
        "STACK_GLOBAL allowed": (state(text("collections") + text("OrderedDict") + b"\x93)R"), "STACK_GLOBAL"),
        "EXT1": (state(b"\x82\x01)R"), "EXT1"),
        "EXT2": (state(b"\x83\x01\x00)R"), "EXT2"),
        "EXT4": (state(b"\x84\x01\x00\x00\x00)R"), "EXT4"),
        "PERSID text": (state(b"P../../etc/passwd\n"), "PERSID"),
        "POP hides a value": (HEAD + b"N0" + state(tensor())[2:], "POP"),
        "DUP": (state(tensor() + b"2"), "DUP"),
        "POP_MARK": (HEAD + b"(N1" + state(tensor())[2:], "POP_MARK"),
        "NEXT_BUFFER": (state(b"\x97"), "NEXT_BUFFER"),
        "LONG4 of 1 MB": (state(b"\x8b" + struct.pack("<i", 2**20) + bytes(2**20)), "0x8b"),
        "BINBYTES": (state(b"B\x01\x00\x00\x00a"), "0x42"),
        "python 2 string": (state(b"U\x01a"), "0x55"),
        "protocol 4 with FRAME": (b"\x80\x04\x95" + struct.pack("<Q", 1) + b"}.", "protocol 2"),
        "FRAME in protocol 2": (HEAD + b"\x95" + struct.pack("<Q", 40) + state(run)[2:], "FRAME"),
        "FRAME crossing": (b"\x80\x04\x95\x02\0\0\0\0\0\0\0X\x10\0\0\0" + run + b"}.", "protocol 2"),
        "no PROTO": (state(tensor())[2:], "protocol 2"),
        "PROTO twice": (HEAD + HEAD + b"}.", "one PROTO"),
        "protocol 0 text": (b"(dp0\n" + run + b".", "protocol 2"),
        "stacked pickles": (state(tensor()) + HEAD + run + b".", "nothing after STOP"),
        "bytes after STOP": (state(tensor()) + b"\0", "nothing after STOP"),
        "truncated after the call": (HEAD + run, "posix.mkdir"),
        "no STOP": (state(tensor())[:-1], "ends with STOP"),
        "cut argument": (HEAD + b"X\xff\xff\xff\x7fabc", "inside the pickle"),
        "cut global": (HEAD + b"cposix\nmkdir", "names that end"),
        "invalid opcode after the call": (HEAD + run + b"\xff", "posix.mkdir"),
        "invalid opcode": (HEAD + b"\xff}.", "0xff"),
        "empty pickle": (b"", "protocol 2"),
        "STOP alone": (HEAD + b".", "one value at STOP"),
        "two values at STOP": (HEAD + b"N" + state(tensor())[2:], "one value at STOP"),
        "open mark at STOP": (HEAD + b"N(" + state(tensor())[2:], "one value at STOP"),
        "stack underflow": (HEAD + b"\x87.", "on the stack"),
        "TUPLE without mark": (HEAD + b"t.", "on the stack"),
        "memo slot missing": (state(b"h\x07"), "on the stack"),
        "memo slot twice": (state(text("posix") + b"q\x01q\x01"), "memo slot"),
        "memo before a value": (HEAD + b"q\x00}.", "on the stack"),
        "200,000 marks": (HEAD + b"(" * 200_000, "nested levels"),
        "call of a text": (state(text("posix.mkdir") + text(marker) + b"\x85R"), "calls of allowed"),
        "call of a dtype": (state(b"ctorch\nfloat32\n)R"), "calls of allowed"),
        "call of a storage type": (state(FLOAT + b")R"), "calls of allowed"),
        "call without a tuple": (state(b"ccollections\nOrderedDict\n]R"), "arguments in a tuple"),
        "function left as a value": (state(b"c_codecs\nencode\n"), "plain containers"),
        "name with a carriage return": (state(b"ccollections\r\nOrderedDict\r\n)R"), "global"),
        "name with a space": (state(b"ccollections \nOrderedDict\n)R"), "global"),
        "name in other letters": (state("ccollectіons\nOrderedDict\n)R".encode()), "ASCII"),
        "name in capitals": (state(b"cCollections\nOrderedDict\n)R"), "global"),
        "name of Python 2": (state(b"c__builtin__\nreduce\n)R"), "global"),
    }
    return {**cases, **_builder_cases(marker)}


def _builder_cases(marker: str) -> dict[str, tuple[bytes, str]]:
    ordered = b"ccollections\nOrderedDict\n)R"
    doubled = b"".join(b"q" + bytes([slot]) + b"h" + bytes([slot]) + b"\x86" for slot in range(40))
    return {
        "tuples doubled 40 times": (beside(b"N" + doubled), "items"),
        "doubled tuples in an error": (beside(b"N" + doubled + b"Q"), "persistent id"),
        "doubled tuples in arguments": (beside(b"c_codecs\nencode\nN" + doubled + b"R"), "arguments of encode"),
        "doubled tuples as a size": (beside(tensor().replace(whole((4,)), b"N" + doubled, 1)), "offset, size"),
        "doubled tuples in a dict in an error": (beside(b"}" + text("a") + b"N" + doubled + b"sQ"), "persistent id"),
        "doubled tuples as a key": (beside(b"}N" + doubled + b"Ns"), "texts or integers"),
        "tensor in the layer versions": (beside(ordered + b"}" + text("_metadata") + tensor() + b"sb"), "_metadata of"),
        "text in the layer versions": (
            beside(ordered + b"}" + text("_metadata") + b"}" + text("a") + b"}" + text("b") + b"]sssb"),
            "_metadata",
        ),
        "list that holds itself": (beside(b"]q\x00h\x00a"), "deep"),
        "lists nested 150 deep": (beside(b"]" * 150 + b"a" * 149), "deep"),
        "key twice": (HEAD + b"}" + text("a") + b"Ns" + text("a") + b"Ns.", "one value a key"),
        "unhashable key": (HEAD + b"}]Ns.", "texts or integers"),
        "colliding integer keys": (HEAD + b"}" + integer(2**61 - 1) + b"Ns.", "texts or integers"),
        "NaN key": (HEAD + b"}G\x7f\xf8\0\0\0\0\0\0Ns.", "texts or integers"),
        "odd number of items": (HEAD + b"}(Nu.", "pairs set"),
        "item set in a list": (HEAD + b"]" + text("a") + b"Ns.", "pairs set"),
        "append to a dict": (HEAD + b"}Na.", "appended to lists"),
        "BUILD of a tensor": (state(tensor() + b"}b"), "_metadata"),
        "BUILD with a class": (state(ordered + b"}" + text("__class__") + b"Nsb"), "_metadata"),
        "BUILD twice": (
            state(ordered + b"}" + text("_metadata") + b"}sb" + b"}" + text("_metadata") + b"}sb"),
            "_meta",
        ),
        "hooks with a function": (state(tensor(hooks=ordered + integer(1) + b"c_codecs\nencode\ns")), "without hooks"),
        "hooks filled later": (
            HEAD
            + b"}"
            + text("a")
            + tensor(hooks=ordered + b"q\x09")
            + b"s"
            + text("b")
            + b"h\x09"
            + integer(1)
            + b"Nss.",
            "without hooks",
        ),
        "set of lists": (state(b"c__builtin__\nset\n]]a\x85R"), "texts or integers"),
        "encode to another codec": (state(b"c_codecs\nencode\n" + text(marker) + text("zip") + b"\x86R"), "encode"),
        "bytearray of 2^62": (state(b"c__builtin__\nbytearray\n" + integer(2**62) + b"\x85R"), "bytearray"),
        "complex of a text": (state(b"c__builtin__\ncomplex\n" + text("1j") + b"\x85R"), "complex"),
        "device of a path": (state(b"ctorch\ndevice\n" + text("/dev/sda") + b"\x85R"), "device"),
        "OrderedDict with arguments": (state(b"ccollections\nOrderedDict\n" + b"]\x85R"), "OrderedDict"),
        "Counter of texts": (state(b"ccollections\nCounter\n}" + text("a") + text("b") + b"s\x85R"), "Counter"),
        "bare tensor": (HEAD + tensor() + b".", "dict with text keys"),
        "bare storage": (state(storage()), "plain containers"),
        "numbers as keys on top": (HEAD + b"}K\x01" + tensor() + b"s.", "dict with text keys"),
        "surrogate text": (state(text("\ud800") + b"0"), "UTF-8"),
        "persistent id of a text": (state(text("storage") + b"Q"), "persistent id"),
        "persistent id of a module": (state(b"(" + text("module") + b"NNNNtQ"), "persistent id"),
        "storage key that escapes": (state(tensor(stored=storage("../../etc/passwd"))), "storage"),
        "storage key that is missing": (state(tensor(stored=storage("7"))), "missing"),
        "storage of 2^62 elements": (state(tensor(stored=storage(count=2**62))), "bytes in data/0"),
        "storage that is too short": (state(tensor(stored=storage(count=3))), "bytes in data/0"),
        "negative storage": (state(tensor(stored=storage(count=-4))), "storage"),
        "storage of two types": (
            HEAD
            + b"}"
            + text("a")
            + tensor()
            + b"s"
            + text("b")
            + tensor(stored=storage(kind=b"ctorch\nIntStorage\n"))
            + b"s.",
            "one type and size",
        ),
        "storage of a strange location": (state(tensor(stored=storage(location="meta\n; rm"))), "storage"),
        "storage that nothing uses": (HEAD + b"}.", "data that the checkpoint uses"),
        "stride 0 giant": (state(tensor((10**12,), (0,))), "each element once"),
        "overlapping windows": (state(tensor((2, 3), (1, 1))), "each element once"),
        "view past the end": (state(tensor((4,), (1,), offset=1)), "inside its"),
        "view before the start": (state(tensor((1,), (1,), offset=-1)), "inside its"),
        "stride past the end": (state(tensor((2,), (4,))), "inside its"),
        "shape without stride": (state(tensor((4,), ())), "inside its"),
        "negative size": (state(tensor((-1,), (1,))), "offset, size"),
        "size that overflows": (state(tensor((2**40, 2**40, 0), (1, 1, 1))), "2.60 elements"),
        "bool as a size": (state(tensor(offset=0).replace(whole((4,)), b"(\x88t", 1)), "tensor"),
        "gradient of integers": (
            state(tensor(stored=storage(kind=b"ctorch\nIntStorage\n"), grad=b"\x88")),
            "gradients of floating",
        ),
        "gradient flag of a dict": (state(tensor(grad=b"}")), "offset, size"),
        "conj bit of a float": (state(tensor(extra=b"}" + text("conj") + b"\x88s")), "fit the dtype"),
        "unknown tensor bit": (state(tensor(extra=b"}" + text("requires") + b"\x88s")), "conj and neg bits only"),
        "quantised storage": (state(tensor(stored=storage(kind=b"ctorch\nQInt8Storage\n"))), "global"),
        "parameter of a text": (
            state(b"ctorch._utils\n_rebuild_parameter\n" + text("a") + b"\x88" + ordered + b"\x87R"),
            "parameter over",
        ),
    }
