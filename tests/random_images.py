"""What the tests of augmentations and mixings share: images, and a Random that says what was drawn."""

import torch

from dltrain.data.random import Random


class Recorded(Random):
    """A Random that keeps, in order, what was drawn of each kind."""

    def __init__(self, seed=0, epoch=0, index=None, count=10000):
        super().__init__("test", seed=seed, epoch=epoch, index=torch.arange(count) if index is None else index)
        self.uniforms, self.whole, self.permutations, self.betas = [], [], [], []

    def uniform(self, *shape, low=0.0, high=1.0):
        return self._keep(self.uniforms, super().uniform(*shape, low=low, high=high))

    def integers(self, bound, *shape):
        return self._keep(self.whole, super().integers(bound, *shape))

    def permutation(self, n):
        return self._keep(self.permutations, super().permutation(n))

    def beta(self, alpha, n):
        return self._keep(self.betas, super().beta(alpha, n))

    def _keep(self, where, drawn):
        where.append(drawn.clone())
        return drawn


class Nowhere(Random):
    """Draws on a device that has no values, so that whatever asks for one fails."""

    def __init__(self, count):
        super().__init__(seed=0, epoch=0, index=torch.empty(count, dtype=torch.int64, device="meta"), device="meta")

    def uniform(self, *shape, low=0.0, high=1.0):
        return torch.empty(shape, device="meta")

    def integers(self, bound, *shape):
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def permutation(self, n):
        return torch.empty(n, dtype=torch.int64, device="meta")

    def beta(self, alpha, n):
        return torch.empty(n, device="meta")


def noise(*shape, low=2):
    """Images with no pixel of 0 or 1, so that what a test fills in is seen."""
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pictures(*shape):
    """Images of soft gradients with a little noise, each within a part of the levels, as photographs are."""
    batch, channels, height, width = shape
    drawn = torch.Generator().manual_seed(2)
    slopes = torch.randn(2, batch, channels, 1, 1, generator=drawn) * 6
    middle = torch.randint(60, 190, (batch, channels, 1, 1), generator=drawn)
    down, right = torch.arange(height)[:, None] - height / 2, torch.arange(width) - width / 2
    grain = torch.randn(shape, generator=drawn) * 4
    return (middle + slopes[0] * down + slopes[1] * right + grain).clamp(20, 230).to(torch.uint8)


def levels_apart(one, other):
    """The largest difference of two uint8 images, in levels."""
    return int((one.int() - other.int()).abs().max())


def likely(count, draws, share):
    """Whether that many of the draws are within 5 standard deviations of the share."""
    return abs(count - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5
