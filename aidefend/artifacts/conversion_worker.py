"""The process that `convert` starts: bytes of a checkpoint in, bytes of a safetensors file out, nothing else.

It warms up on a checkpoint of its own, so that every module is imported, and then gives up the right to open anything:
from then on the limit of file descriptors is zero (no files, no sockets) and the limit of processes is zero.
"""

import json
import resource
import sys


def main() -> int:
    """Convert standard input to standard output; 3 and a message when the input is refused."""
    order = json.loads(sys.argv[1])
    sys.path[:] = order["paths"]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, order["seconds"])
    _limit(resource.RLIMIT_AS, order["memory"])
    _limit(resource.RLIMIT_FSIZE, order["bytes"])

    import torch

    from aidefend._core.errors import AidefendError

    torch.set_num_threads(1)
    data = sys.stdin.buffer.read()
    _warm_up()
    _limit(resource.RLIMIT_NOFILE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    try:
        written = _convert(data, order)
    except AidefendError as error:
        sys.stderr.write(str(error))
        return 3
    sys.stdout.buffer.write(written)
    sys.stdout.buffer.flush()
    return 0


def _convert(data: bytes, order: dict) -> bytes:  # type: ignore[type-arg]  # JSON
    import torch

    from aidefend.artifacts.conversion import pick_entry
    from aidefend.artifacts.limits import Limits
    from aidefend.artifacts.loading import load_bytes
    from aidefend.artifacts.safetensors_format import write_safetensors

    fields = dict(order["limits"])
    dtypes = fields.pop("dtypes")
    kinds = None if dtypes is None else frozenset(getattr(torch, name) for name in dtypes)
    limits = Limits(**{**fields, "min_torch": tuple(fields["min_torch"])}, dtypes=kinds)
    return write_safetensors(pick_entry(load_bytes(data, order["name"], limits), order["entry"], torch.Tensor))


def _warm_up() -> None:
    """Convert a checkpoint of our own: what the real one needs is imported before the rights are given up."""
    import io

    import torch

    from aidefend.artifacts.limits import Limits

    buffer = io.BytesIO()
    values = torch.ones(2)
    torch.save({"a": values, "b": values.bfloat16(), "c": torch.ones(1, dtype=torch.complex64).conj()}, buffer)
    numbers = {"min_torch": list(Limits().min_torch), "dtypes": None}
    _convert(buffer.getvalue(), {"limits": numbers, "name": "warm-up.pt", "entry": None})


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process; never raise one that is stricter already."""
    _, hard = resource.getrlimit(kind)
    allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (allowed, allowed))


if __name__ == "__main__":
    sys.exit(main())
