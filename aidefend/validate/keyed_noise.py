"""Noise on the answer that a secret key and the input decide: to ask again brings nothing new."""

import dataclasses
import hashlib
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from aidefend._core.checks import check_choice, check_kind, check_number, check_same_rows, check_tensor, refuse
from aidefend.validate.detector import wide
from aidefend.validate.outputs import keep_top

_LEAST_KEY = 16
_MOST_KEY = 64  # what BLAKE2b takes


@dataclasses.dataclass(frozen=True)
class KeyedNoise:
    """Probabilities after Gaussian noise on the log-probabilities, drawn from the key and the quantised input.

    Guarantee: equal inputs get equal noise, in every batch, process and order: the mean of repeated answers is no
        better than one. Without the key the noise of an input cannot be told from a fresh draw (BLAKE2b as a keyed
        function). With argmax="keep", the predicted class is that of the logits.
        It does not stop: averaging over *neighbours* (an input that moves by more than `step` gets new noise), a clone
        (noise of mean zero is averaged out by training), membership inference and evasion by labels (argmax="keep").
    Args:
        key: 16 to 64 secret random bytes, such as secrets.token_bytes(32). Never written by `Guard.save`, which keeps
            a fingerprint of it.
        scale: Standard deviation of the noise on each log-probability, > 0.
        step: Width of the cells of the input within which the noise is the same, in units of x; > 0.
        argmax: "keep" swaps the largest probability back to the predicted class where noise moved it; "free" does not,
            so that labels err too.
    Returns: (N, K) float that sums to 1. In a guard, a refused row has NaN.
    Cost: A hash of each input and K draws, on the CPU.
    Source: Ours; the keyed function is BLAKE2b (RFC 7693) and SHAKE-256 (FIPS 202).
    Example:
        >>> noisy = KeyedNoise(bytes(16), scale=0.5)
        >>> x, logits = torch.zeros(2, 4), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
        >>> shown = noisy(logits, x)
        >>> bool((shown[0] == shown[1]).all()), shown.argmax(dim=1).tolist()
        (True, [1, 1])
    """

    key: bytes = dataclasses.field(repr=False)
    scale: float = 0.5
    step: float = 1e-3
    argmax: Literal["keep", "free"] = "keep"
    uses_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kind(self.key, bytes, "key", "Pass secrets.token_bytes(32)")
        if not _LEAST_KEY <= len(self.key) <= _MOST_KEY:
            rule = f"key of {_LEAST_KEY} to {_MOST_KEY} bytes"
            raise refuse(rule, "key", f"{len(self.key)} bytes", "Pass secrets.token_bytes(32)")
        check_number(self.scale, "scale", 0.0, open_low=True)
        check_number(self.step, "step", 0.0, open_low=True)
        check_choice(self.argmax, ("keep", "free"), "argmax")

    def __call__(self, logits: Tensor, x: Tensor) -> Tensor:
        """(N, K) logits of x (N, ...) to (N, K) probabilities."""
        check_tensor(logits, "logits", ndim=2, floating=True, finite=False)
        check_tensor(x, "x", finite=False)
        if x.ndim < 2:
            raise refuse("inputs of shape (N, ...) with at least one feature", "x", x, "Add the batch dimension")
        check_same_rows(("logits", "x"), len(logits), len(x))
        exact = wide(logits)
        noise = torch.from_numpy(self._noise(x, logits.shape[1])).to(exact)
        shown = (exact.log_softmax(dim=1) + noise).softmax(dim=1)
        return keep_top(shown, exact.argmax(dim=1)) if self.argmax == "keep" else shown

    @property
    def fingerprint(self) -> str:
        """Names the key without giving it away: what a saved guard compares with."""
        return hashlib.blake2b(b"aidefend.keyed-noise", key=self.key, digest_size=16).hexdigest()

    def _noise(self, x: Tensor, classes: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
        """Normal draws (N, K), the same for the same cells of the input whatever the batch and the device."""
        cells = torch.round(x.detach().cpu().double().flatten(1) / self.step).numpy() + 0.0  # no -0
        head = str(tuple(x.shape[1:])).encode()
        seeds = (hashlib.blake2b(head + row.tobytes(), key=self.key, digest_size=32).digest() for row in cells)
        streams = b"".join(hashlib.shake_256(seed).digest(8 * classes) for seed in seeds)
        whole = np.frombuffer(streams, dtype="<u8").reshape(len(x), classes) >> np.uint64(11)
        return np.asarray(self.scale * ndtri((whole + 0.5) / 2.0**53), dtype=np.float64)
