"""Several processes that train one model together: each a part of every step's images, all with the same weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dltrain.errors import DeviceError

TIMEOUT = timedelta(minutes=10)  # of waiting for the others; one that has died is noticed at once


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is.  Of one alone, nothing is sent anywhere."""

    rank: int = 0  # counted from 0; the first writes and speaks for all
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, value: Any = None) -> Any:
        """The first process's value, in each."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def highest(self, *numbers: int) -> list[int]:
        """Each number's maximum over the processes."""
        if self.world == 1:
            return [*numbers]
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each process's tensor, of the same shape in all, in their order."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor)
        return found

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrites these with the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that torchrun or `--processes` started; alone where neither did.

    Over nccl where tensors are on a CUDA device, one for each process of a machine; over gloo on CPUs.

    Raises DeviceError where there are fewer devices than processes, or where the others do not come within TIMEOUT.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            text = f"process {local} of this machine has none of its {torch.cuda.device_count()} CUDA devices"
            raise DeviceError(f"{text}: start as many processes as there are, or hide them (CUDA_VISIBLE_DEVICES=)")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DeviceError(f"process {rank} of {world}: did not meet the others at {address}: {reason}") from error
    try:
        yield Processes(rank, world)
    finally:
        dist.destroy_process_group()


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.computes = forward

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> Any:
        return self.computes(images, targets)


class Replica:
    """A model's forward pass, in each process: a backward pass leaves the mean of their gradients in each."""

    def __init__(self, model: nn.Module, forward: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        """forward: gives the loss of the model, and its outputs"""
        # where it does not look for unused parameters, it fills its buckets in another order from the second step on:
        # numbers of three processes are then added in another order, and a run that goes on ends in other bits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, which torch 2.10 knows alone
            self._ddp = DistributedDataParallel(
                _Forward(model, forward), broadcast_buffers=False, find_unused_parameters=True
            )

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, outputs = self._ddp(images, targets)
        return loss, outputs

    def alone(self) -> AbstractContextManager[None]:
        """Within, gradients are added up in this process; the first backward pass after it shares them."""
        context: AbstractContextManager[None] = self._ddp.no_sync()
        return context


class _Norm(torch.autograd.Function):
    """Batch norm by the mean and variance of all processes' images, as Ioffe & Szegedy 2015 differentiate it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, world: int, seen: Any) -> torch.Tensor:
        """seen: is called with mean and biased variance [C], and the number of values a channel"""
        channels = x.shape[1]
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        own = torch.cat([mean.float(), variance.float(), mean.new_full((1,), x.numel() // channels).float()])
        every = torch.stack(Processes(0, world).gather(own))  # [world, 2 C + 1]
        counts = every[:, -1:]
        count = counts.sum()
        means, variances = every[:, :channels], every[:, channels:-1]
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        seen(mean, variance, count)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.world, ctx.has_bias = eps, world, bias is not None
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        gradient = grads[0].contiguous(memory_format=torch.channels_last) if _is_last(x) else grads[0].contiguous()
        into_x, into_weight, into_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # these are as if mean and variance were constants: what goes through them is added, of all processes' images
        sums = Processes(0, ctx.world).add(torch.cat([into_weight, into_bias]).float()) / count
        of_weight, of_bias = sums.chunk(2)
        inverse = (variance + ctx.eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        # as a batch norm of x, which is one pass over it: products with [1, C, 1, 1] take six times as long; and not in
        # place, which takes twice as long in bfloat16
        into_x = into_x + nn.functional.batch_norm(
            x, mean, torch.zeros_like(mean), -scale * inverse * of_weight, -scale * of_bias, False, 0.0, 1.0
        )
        return into_x, None if weight is None else into_weight, into_bias if ctx.has_bias else None, None, None, None


def _is_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def share_batchnorm(model: nn.Module, processes: Processes) -> None:
    """Has every batch norm of a model, in training, take its statistics from the images of all processes together.

    The modules stay those that they are, for whatever asks for their names and classes.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _shared_forward(module, processes)  # type: ignore[method-assign, assignment]


def _shared_forward(module: _BatchNorm, processes: Processes) -> Callable[[torch.Tensor], torch.Tensor]:
    own = module.forward

    def seen(mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        if module.running_mean is None or module.running_var is None or module.num_batches_tracked is None:
            return
        module.num_batches_tracked.add_(1)
        share = 1 / module.num_batches_tracked if module.momentum is None else module.momentum
        module.running_mean.lerp_(mean, share)
        module.running_var.lerp_(variance * count / (count - 1), share)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return own(x)
        found: torch.Tensor = _Norm.apply(x, module.weight, module.bias, module.eps, processes.world, seen)
        return found

    return forward
