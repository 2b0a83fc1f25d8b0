"""What is known of the published data sets: the digest of their arrays, their classes, and where people keep copies."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DatasetName = Literal["mnist", "fashion-mnist"]


@dataclass(frozen=True)
class Published:
    """One published data set. `digest` is `content_digest` of the 60,000 + 10,000 images as published."""

    title: str
    digest: str
    classes: tuple[str, ...]
    archives: tuple[str, ...]
    folders: tuple[str, ...]


_CLOTHES = "T-shirt/top|Trouser|Pullover|Dress|Coat|Sandal|Shirt|Sneaker|Bag|Ankle boot"

# The arrays behind both digests were compared with the MD5 sums of the unpacked IDX files as published, which many
# projects record (train-images-idx3-ubyte of MNIST: 6bbc9ace898e44ae57da46a324031adb; of Fashion-MNIST:
# f4a8712d7a061bf5bd6d2ca38dc4d50a).
PUBLISHED: Mapping[DatasetName, Published] = MappingProxyType(
    {
        "mnist": Published(
            title="MNIST",
            digest="8206e525d215882990e8b985e928ca273185ffa9d4d79007cfef31d00195b14d",
            classes=tuple("0123456789"),
            archives=("mnist.npz", "MNIST.npz"),
            folders=("MNIST/raw", "MNIST", "mnist/raw", "mnist", "raw", "."),
        ),
        "fashion-mnist": Published(
            title="Fashion-MNIST",
            digest="5c93cf9277d5968eae099123b2c0472e80412133a0235e93a25bc580ebb3c81e",
            classes=tuple(_CLOTHES.split("|")),
            archives=("fashion-mnist.npz", "fashion_mnist.npz", "FashionMNIST.npz"),
            folders=("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist", "raw", "."),
        ),
    }
)


def identify(digest: str) -> DatasetName | None:
    """The published data set that has this digest."""
    return next((name for name, known in PUBLISHED.items() if known.digest == digest), None)
