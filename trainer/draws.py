"""Random numbers of a batch that do not depend on how the batch is cut.

A number belongs to (seed, step, the sample's place in the global batch, how many were drawn for it
before). So one process, eight ranks and an accumulation of micro-batches all draw the same masks,
permutations and degradations, and nothing has to be saved to resume. The numbers are integers of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), computed on the device of the batch with the same
bits on every device.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FLOAT_BITS = 24  # of a float32's significand


class SampleGenerator:
    """Draws for the samples `first .. first + count - 1` of the global batch of one step.

    Attributes:
        count: B, the number of samples.
        device: Where the numbers are made.
        shared: A CPU generator that is in the same state for every part of the step's batch, for
            what a whole batch has in common.
    """

    def __init__(
        self, seed: int, step: int, *, first: int = 0, count: int, device: str | torch.device
    ) -> None:
        """Start at the first number of every sample."""
        self.count = count
        self.device = torch.device(device)
        self.shared = torch.Generator().manual_seed(derived_seed(seed, step, "shared"))
        base = derived_seed(seed, step, "samples")
        self._cpu_keys = _mix(torch.arange(first, first + count) * _signed(_GOLDEN) + base)[:, None]
        self._keys = self._cpu_keys.to(self.device, non_blocking=True)  # (B, 1)
        self._num_drawn = 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return float32 (B, *shape), uniform in [low, high), but for what rounds to `high`."""
        bits = self._bits(torch.Size(shape).numel()).reshape(self.count, *shape)
        units = _shift_right(bits, 64 - _FLOAT_BITS).float() / 2**_FLOAT_BITS
        return low + (high - low) * units

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return float32 (B, *shape), normally distributed."""
        # Half a step inside of (0, 1), where the inverse is finite. The last one would round to 1.
        units = self.uniform(*shape) + 2.0 ** -(_FLOAT_BITS + 1)
        units.clamp_(max=1 - 2.0**-_FLOAT_BITS)
        return mean + std * torch.special.ndtri(units.double()).float()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 (B, *shape), uniform in low .. high - 1."""
        units = self.uniform(*shape)
        return low + (units * (high - low)).long().clamp_(max=high - low - 1)

    def permutations(self, length: int) -> Tensor:
        """Return int64 (B, length), a permutation of 0 .. length - 1 in every row."""
        return self._bits(length).argsort(dim=1, stable=True)

    def generators(self) -> Iterator[torch.Generator]:
        """Yield a CPU generator per sample, for what is drawn one sample at a time."""
        # Made on the CPU, the seeds need not be waited for.
        for seed in _shift_right(self._bits(1, self._cpu_keys), 1).flatten().tolist():
            yield torch.Generator().manual_seed(seed)

    def _bits(self, length: int, keys: Tensor | None = None) -> Tensor:
        """Return int64 (B, length) of 64 random bits each, the next ones of every sample."""
        keys = self._keys if keys is None else keys
        counters = torch.arange(1, length + 1, device=keys.device) + self._num_drawn
        self._num_drawn += length
        return _mix(keys + counters * _signed(_GOLDEN))


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """Return 63 bits, as many as torch takes for a seed, that depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX_2)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # torch has no unsigned shift: its own keeps the sign.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
