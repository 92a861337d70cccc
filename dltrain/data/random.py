"""Where randomness comes from: functions of what they are named by, so that nothing need be saved to draw it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from dltrain.lazy import torch


def _number(parts: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the parts and nothing else: ("order", seed, epoch), say."""
    return torch.Generator(device).manual_seed(_number(parts))


class Random:
    """What the augmentations of one batch draw from, in their order; everything is on the batch's device.

    seed: the run's; epoch: counted from 0; index: int64 `[B]`, the images' places in the training split

    Where several processes share a batch, each draws for all of it and keeps its own images' numbers: of what is drawn
    for each image.  So they are the same as in one process.  A dimension of B numbers is taken for the images.
    """

    def __init__(
        self,
        *parts: object,
        seed: int,
        epoch: int,
        index: torch.Tensor,
        device: torch.device | str = "cpu",
        before: int = 0,
        after: int = 0,
    ) -> None:
        """parts: what, besides seed and epoch, the numbers are to depend on

        before, after: images of the batch that other processes have
        """
        self.seed = seed
        self.epoch = epoch
        self.index = index
        self.device = torch.device(device)
        self.before = before
        self.after = after
        self._number = _number((seed, epoch, *parts))
        self._draws = 0
        self._generator: torch.Generator | None = None

    @property
    def generator(self) -> torch.Generator:
        if self._generator is None:  # making one costs 10 us
            self._generator = torch.Generator(self.device).manual_seed(self._number)
        return self._generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """float32 in low..high."""
        drawn = self._own(shape, lambda whole: torch.rand(whole, generator=self.generator, device=self.device))
        return drawn if (low, high) == (0, 1) else drawn * (high - low) + low

    def normal(self, *shape: int) -> torch.Tensor:
        """float32 of mean 0 and standard deviation 1."""
        return self._own(shape, lambda whole: torch.randn(whole, generator=self.generator, device=self.device))

    def integers(self, bound: int, *shape: int) -> torch.Tensor:
        """int64 in 0..bound-1."""
        return self._own(shape, lambda whole: torch.randint(bound, whole, generator=self.generator, device=self.device))

    def _own(self, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
        """What is drawn for the images here, of what is drawn for all."""
        images = len(self.index)
        if not self.before + self.after or images not in (shape[0], shape[-1]):
            return draw(shape)
        dim = 0 if shape[0] == images else len(shape) - 1
        whole = draw((*shape[:dim], self.before + images + self.after, *shape[dim + 1 :]))
        return whole.narrow(dim, self.before, images)

    def permutation(self, n: int) -> torch.Tensor:
        """int64 `[n]`: 0..n-1 in some order."""
        return torch.randperm(n, generator=self.generator, device=self.device)

    def beta(self, alpha: float, n: int) -> torch.Tensor:
        """float32 `[n]` of the distribution Beta(alpha, alpha), drawn on the CPU: torch's has no generator."""
        import numpy

        self._draws += 1
        drawn = numpy.random.default_rng([self._number, self._draws]).beta(alpha, alpha, n)
        return torch.from_numpy(drawn).float().to(self.device, non_blocking=True)
