"""The hostile corpus: every known way to make a loader execute code, exhaust memory, or see what a scanner did not."""

from typing import NamedTuple

from tests.artifacts.hostile_files import file_cases, zip_cases
from tests.artifacts.hostile_pickles import GADGETS, checkpoint, opcode_cases, state, text


class Hostile(NamedTuple):
    """One file: its name in the corpus, the file name it claims, its bytes, words that the refusal must hold."""

    name: str
    filename: str
    data: bytes
    words: str


def corpus(marker: str) -> list[Hostile]:
    """All files; those that can execute something would create the folder `marker`."""
    found = [_gadget(name, marker) for name in GADGETS]
    found += [
        Hostile(name, "model.pt", checkpoint(pickle), words) for name, (pickle, words) in opcode_cases(marker).items()
    ]
    found += [Hostile(name, *case) for name, case in zip_cases(marker).items()]
    found += [Hostile(name, *case) for name, case in file_cases(marker).items()]
    return found


def _gadget(name: str, marker: str) -> Hostile:
    module, _, attribute = name.rpartition(".")
    call = f"c{module}\n{attribute}\n".encode() + text(marker) + b"\x85R"
    return Hostile(f"gadget {name}", "model.pt", checkpoint(state(call)), name)
