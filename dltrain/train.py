"""The training loop."""

from __future__ import annotations

import math
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter
from types import FrameType

import torch

from dltrain.averaging import Followers, evaluation_weights, training_mode
from dltrain.build import Setup
from dltrain.data.batches import Batches, labels_of
from dltrain.errors import DivergedError, Stopped
from dltrain.evaluate import evaluate, predicted
from dltrain.logs import Log
from dltrain.optimizers import ascend, descend
from dltrain.rundir import RunFolder
from dltrain.state import Best, Run


def train(run: Run, folder: RunFolder, log: Log) -> None:
    """Trains from where the run stands to its end; `run.progress.best` then holds the weights to keep, if any do.

    Raises DivergedError where the loss or a gradient is not finite, before it can reach a checkpoint, and Stopped,
    after saving, on SIGINT or SIGTERM.
    """
    setup, config, at, settings = run.setup, run.setup.config, run.progress, run.setup.config.train
    model, optimizers, placement = setup.model, setup.optimizers, setup.placement
    epoch_loss, epoch_correct = run.sums.unbind()  # views
    followers = Followers(run)
    batches = setup.batches()
    healthy = torch.ones((), dtype=torch.bool, device=placement.device)  # whether all so far was finite
    saved = monotonic()
    if config.chosen_by == "last":
        at.best = None  # of an earlier end of this run

    def again() -> torch.Tensor:
        return gradient(setup, batches, at.epoch, at.step)

    def check_finite(loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Waits for the device."""
        if not healthy:
            raise _diverged(run, f"the loss is {loss.item()} and the gradient's norm {norm.item()}")

    def save_where(due: object) -> None:
        """Between two steps: saves where it is due, or the clock says so, or a signal asks to stop here."""
        nonlocal saved
        if due or stop or monotonic() - saved > 60 * settings.checkpoint_every_minutes:
            if not healthy:
                raise _diverged(run, "a loss or gradient since the last log line is not finite")
            log.flush()
            _save(run, folder)
            saved = monotonic()
        if stop:
            text = f"stopped after step {run.global_step}, and saved; go on with: {go_on(run, folder)}"
            raise Stopped(text, stop[0])

    with _stop_signals() as stop:
        while not is_over(run):
            training_mode(model)
            clock = _Clock()
            due: object = None
            while at.step < batches.steps:
                optimizers.set_rates(at.epoch + at.step / batches.steps, settings.epochs, at.losses)
                loss, norm = direction(setup, batches, at.epoch, at.step, epoch_correct)
                epoch_loss.add_(loss, alpha=batches.images_in(at.step))
                healthy &= torch.isfinite(loss + norm)
                if _asks_each_step(placement.device):
                    check_finite(loss, norm)
                optimizers.step(loss, again)
                at.step += 1
                followers.follow()
                epoch_ends = at.step == batches.steps

                if run.global_step % settings.log_every_steps == 0 or epoch_ends:
                    check_finite(loss, norm)
                    loss_sum, correct = run.sums.tolist()  # the only place that waits for the device
                    at.epoch_seconds += clock.lap()
                    seen = batches.images_before(at.step)
                    log.step(
                        run,
                        loss=(loss_sum - at.loss_sum) / (seen - at.seen),
                        accuracy=(correct - at.correct) / (seen - at.seen),
                        lr=optimizers.lr,
                        gradient_norm=norm.item(),
                        images_per_second=(seen - at.seen) / (at.epoch_seconds - at.logged_seconds),
                    )
                    at.loss_sum, at.correct, at.seen, at.logged_seconds = loss_sum, correct, seen, at.epoch_seconds
                due = settings.checkpoint_every_steps and run.global_step % settings.checkpoint_every_steps == 0
                if not epoch_ends:  # else after the epoch's evaluation, so that its record is never written twice
                    at.epoch_seconds += clock.lap()
                    save_where(due)
                    clock.lap()

            trained = {"loss": at.loss_sum / at.seen, "accuracy": at.correct / at.seen}
            at.epoch, at.step, at.seconds = at.epoch + 1, 0, at.seconds + at.epoch_seconds
            scores = None
            if setup.data.val is not None:
                with evaluation_weights(run, batches):
                    scores = evaluate(model, setup.data.val, setup.normalise, placement, setup.loss).scores()
                    if not math.isfinite(scores["loss"]):
                        raise _diverged(run, f"the val loss is {scores['loss']}")
                    if config.chosen_by != "last":
                        value = scores["accuracy"] if config.chosen_by == "val_accuracy" else -scores["loss"]
                        if at.best is None or value > at.best.value:
                            at.best = Best(value, at.epoch, run.global_step, _weights(model))
            at.losses.append(scores["loss"] if scores else trained["loss"])
            log.epoch(run, trained, scores, lambda: next(batches.step(0, 0))[0])
            at.loss_sum, at.correct, at.seen, at.epoch_seconds, at.logged_seconds = 0.0, 0.0, 0, 0.0, 0.0
            run.sums.zero_()
            save_where(due or (is_over(run) and config.chosen_by != "last"))
        if config.chosen_by == "last":
            with evaluation_weights(run, batches):
                at.best = Best(0.0, at.epoch, run.global_step, _weights(model))
            save_where(due=True)


def gradient(
    setup: Setup, batches: Batches, epoch: int, step: int, correct: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the mean loss `[]` of a step's images and leaves its gradient in the parameters.

    correct: `[]`, to which the number of right predictions is added
    """
    setup.optimizers.zero_grad()
    loss = torch.zeros((), device=setup.placement.device)
    for images, targets, share in batches.step(epoch, step):  # [B, C, H, W], [B] or [B, classes], B / step's images
        with setup.placement.autocast():
            outputs = setup.model(images)  # [B, outputs]
        part = setup.loss(outputs, targets)
        if share != 1:
            part = part * share
        part.backward()
        loss += part.detach()
        if correct is not None:
            correct += (predicted(outputs.detach()) == labels_of(targets)).sum()
    return loss


def direction(
    setup: Setup, batches: Batches, epoch: int, step: int, correct: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves what a step goes along in the parameters' gradients; the mean loss `[]` and the gradient's norm `[]`.

    That is the gradient, or at sharper weights (optim.sam_rho), and no longer than train.clip_norm; the norm is before.
    """
    config, parameters = setup.config, setup.parameters
    loss = gradient(setup, batches, epoch, step, correct)
    if config.optim.sam_rho:
        _sharpen(setup.model, parameters, config.optim.sam_rho, lambda: gradient(setup, batches, epoch, step))
    norm = _gradient_norm(parameters)
    if config.train.clip_norm:  # as torch.nn.utils.clip_grad_norm_
        scale = (config.train.clip_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
    return loss, norm


def _save(run: Run, folder: RunFolder) -> None:
    """Writes the run's checkpoint and the weights kept so far; weights that are not finite are never written."""
    for name, tensor in run.setup.model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _diverged(run, f"{name} is not finite")
    best = run.progress.best
    if best:  # before the checkpoint: a run that goes on from the last one has nothing left to write
        folder.write("best.safetensors", run.encode_weights(best.weights, best.step))
    folder.save(run.global_step, run.encode())


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _sharpen(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], rho: float, again: Callable[[], torch.Tensor]
) -> None:
    """Replaces the gradient by that at the worst weights within `rho` of these, to first order (Foret et al. 2021).

    Batch norm's running statistics are those of the weights themselves.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    weights = ascend(parameters, rho)
    again()
    descend(parameters, weights)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _gradient_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together: float32 `[]`."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def go_on(run: Run, folder: RunFolder) -> str:
    """The command that goes on with a run."""
    plugins = (part for path in run.setup.config.plugins for part in ("--plugin", path))
    return shlex.join(["dltrain", "train", "--resume", str(folder.path), *plugins])


def is_over(run: Run) -> bool:
    """Whether a run has had its epochs, or `train.patience_epochs` without a better one."""
    settings, at = run.setup.config.train, run.progress
    patience = settings.patience_epochs or math.inf
    return at.epoch >= settings.epochs or (at.best is not None and at.epoch - at.best.epoch >= patience)


def _asks_each_step(device: torch.device) -> bool:
    """Whether a number of the device's can be read without waiting for it; elsewhere log lines and saves ask."""
    return device.type == "cpu"


def _diverged(run: Run, what: str) -> DivergedError:
    rate = run.setup.optimizers.lr
    mend = "lower optim.lr, warm up (schedule.warmup_epochs) or clip the gradient (train.clip_norm: 1)"
    return DivergedError(
        f"step {run.global_step + 1}: {what}, at learning rate {rate:.3g}; nothing was saved of it: {mend}"
    )


class _Clock:
    def __init__(self) -> None:
        self.start = perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self.start = self.start, perf_counter()
        return self.start - last


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM adds its number to; a second SIGINT ends the process as it would without us."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
