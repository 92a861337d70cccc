"""A trained model as one file that other programs run: ONNX, or torch's own exported program.

Normalisation, views and what turns outputs into probabilities are in the file: images go in as bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from dltrain import __version__, rundir
from dltrain.data.batches import Normalise
from dltrain.data.files import Files, data_root
from dltrain.data.prepare import prepare
from dltrain.data.random import generator
from dltrain.errors import CheckpointError, ConfigError, DataError, names_memory
from dltrain.evaluate import over_views
from dltrain.tables import say
from dltrain.tasks import Reconstruction, probabilities
from dltrain.text import shortened
from dltrain.trained import Trained

IMAGES = 100  # that the written model is compared on
# Of probabilities or pixels.  Rounding in fp32 moves them by 1e-7 to 1e-5, a layer that is translated wrongly by far
# more: LeNet-5's, where the sums of its poolings become means, by 4e-3 at random weights, by 1 at trained ones.
TOLERANCE = 1e-4
INPUT = "images"
METADATA = "dltrain.json"  # the extra file of a .pt2
LARGEST_ONNX = 1 << 31  # bytes that a protobuf message may have
Run = Callable[..., Tensor]  # float32 `[B, …]` of one or more tensors `[B, …]`


@dataclass(frozen=True)
class Format:
    """A kind of file: how a program becomes its bytes, and how these are run again.

    packages: that it needs besides torch; mend: what to do where a model does not go into it
    """

    suffix: str
    packages: tuple[str, ...]
    encode: Callable[[torch.export.ExportedProgram, Mapping[str, Any]], bytes]
    decode: Callable[[bytes], Run]
    mend: str


class Ending(NamedTuple):
    """What a model's outputs come to for whoever uses it.

    name: of what comes out; of: what it is of the outputs; decides: whether the largest along dimension 1 is the answer
    """

    name: str
    of: Callable[[Tensor], Tensor]
    decides: bool


def ending(task: object) -> Ending:
    """Probabilities `[B, classes]`, at each place of a line `[B, classes + 1, T]`; pixels `[B, C, H, W]` in 0..1."""
    if isinstance(task, Reconstruction):
        return Ending("pixels", task.pixels, decides=False)
    return Ending("probabilities", probabilities, decides=True)


class Exported(nn.Module):
    """Images uint8 `[B, C, H, W]` as they are on disk -> what the task's ending is, float32, in fp32 throughout."""

    mean: Tensor
    scale: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model
        self.views = trained.config.evaluate.views
        self.ending = ending(trained.task)
        # `Normalise` keeps what it has seen last, which would be a tensor of the trace
        self.register_buffer("mean", trained.normalise.mean)
        self.register_buffer("scale", trained.normalise.scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.ending.of(over_views(self.model, images, cast(Normalise, self.normalised), self.views)[0])

    def normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) * self.scale


def check_asked(format: str, out: Path | None) -> None:
    """Raises ConfigError where there is no such format, the name is another's, or a package is missing."""
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected {' or '.join(FORMATS)}")
    asked = FORMATS[format]
    if out and out.suffix != asked.suffix:
        raise ConfigError(f"--out {out}: expected a name that ends in {asked.suffix}, for --format {format}")
    missing = [package for package in asked.packages if importlib.util.find_spec(package) is None]
    if missing:
        text = f"needs {' and '.join(missing)}: pip install 'dltrain[export]'"
        raise ConfigError(f"--format {format} {text}; --format torch needs nothing more")


def export(trained: Trained, format: str, out: Path | None) -> dict[str, Any]:
    """Writes the model, on the CPU, to `out`, by default beside its checkpoint; what was written, JSON-able.

    What the file says is compared with what torch says of images of the test split, or of random ones where that is
    not here, before there is a file.  The model's weights want no gradients afterwards.

    Raises CheckpointError where the model's outputs are not finite; ConfigError where the format does not carry the
    model: it cannot be translated, is too large, or does not agree; OutputError where the file cannot be written.
    """
    asked, says = FORMATS[format], ending(trained.task)
    path, place = out or trained.path.with_suffix(asked.suffix), f"{trained.path}: --format {format}"
    images, source, reason = sample(trained)
    with torch.no_grad():  # as `dltrain eval` computes them, but in fp32: not through what is exported
        views = trained.config.evaluate.views
        expected = says.of(over_views(trained.model, images, trained.normalise, views)[0])
    if not expected.isfinite().all():
        raise CheckpointError(f"{trained.path}: its outputs for {source} images are not finite")
    model = Exported(trained).eval().requires_grad_(False)
    try:
        content, run = written(model, (images.new_zeros(2, *trained.shape),), asked, described(trained))
        found = torch.cat([run(part) for part in images.split(IMAGES - 1)])  # of 99, and of one
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    except Exception as error:  # the exporters raise almost anything
        if names_memory(error):
            raise
        what = culprit(model, images, asked) or "the model"
        raise ConfigError(f"{place}: {what} cannot be translated: {_reason(error)}; {asked.mend}") from error
    difference = (found - expected).abs().max().item()
    differ = found.argmax(1, keepdim=True) != expected.argmax(1, keepdim=True)
    check = {
        "images": len(images),
        "of": source,
        "why_random": reason,
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "different_predictions": int(differ.flatten(1).any(1).sum()) if says.decides else None,
    }
    if not difference <= TOLERANCE:  # also of a NaN
        what = culprit(model, images, asked) or "the model"
        text = f"does not become what torch computes: {says.name} differ by {difference:.2g}, rounding by {TOLERANCE:g}"
        raise ConfigError(f"{place}: {what} {text} at most; nothing was written; {asked.mend}")
    rundir.write_atomically(path, content)
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "chosen_by": trained.chosen_by,
        "format": format,
        "file": str(path),
        "bytes": len(content),
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["batch", *trained.shape]},
        "output": {"name": says.name, "dtype": "float32", "shape": ["batch", *expected.shape[1:]]},
        "task": trained.config.task.name,
        "views": len(views),
        "check": check,
    }


def described(trained: Trained) -> dict[str, Any]:
    """What a file says of its model, JSON-able."""
    normalise = trained.normalise
    return {
        "name": trained.config.name,
        "task": trained.config.task.name,
        "output": ending(trained.task).name,
        "classes": list(trained.classes),
        "shape": list(trained.shape),
        "mean": [float(f"{each:.7g}") for each in (normalise.mean / 255).flatten()],  # the digits that a float32 has
        "std": [float(f"{each:.7g}") for each in 1 / (normalise.scale * 255).flatten()],
        "views": len(trained.config.evaluate.views),
        "step": trained.step,
        "chosen_by": trained.chosen_by,
        "dltrain": __version__,
        "torch": torch.__version__,
    }


def sample(trained: Trained) -> tuple[Tensor, str, str | None]:
    """Images uint8 `[N, C, H, W]` from all over the test split, at most 100; random ones where it cannot be read.

    Besides, whose they are, and why they are random.  Nothing is downloaded.
    """
    settings = trained.config.data
    try:
        files = Files(data_root(settings.root), verify=False, download=False)
        data = prepare(settings.source.build(files), seed=trained.config.seed, classes=settings.classes)
        if data.shape != trained.shape:
            raise DataError(f"{settings.source.name}: has images of {list(data.shape)} now")
    except (DataError, ConfigError) as error:
        drawn = torch.randint(256, (IMAGES, *trained.shape), dtype=torch.uint8, generator=generator("export"))
        return drawn, "random", str(error).partition(";")[0]
    count = min(IMAGES, len(data.test))
    spread = torch.arange(count) * len(data.test) // count  # a folder's images come class by class
    return data.test.images.index_select(0, spread), f"{settings.source.name} test", None


def written(model: nn.Module, inputs: tuple[Tensor, ...], asked: Format, about: Mapping[str, Any]) -> tuple[bytes, Run]:
    """A model as the bytes of a file, and these bytes as what can be run; inputs: `[B, …]`, of any B.

    Raises whatever the exporters raise.
    """
    with _quiet():
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # lines of our source, and the folders where it lies
        content = asked.encode(program, about)
        return content, asked.decode(content)


def culprit(model: nn.Module, images: Tensor, asked: Format) -> str | None:
    """The first of the innermost layers that by itself is not translated, or not to what torch computes; else None."""
    calls: dict[str, tuple[str, nn.Module, tuple[Any, ...], Any]] = {}  # one of each kind and size, as they are left

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def left(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if all(isinstance(each, Tensor) for each in (*inputs, output)):
                calls.setdefault(f"{module} {[each.shape for each in inputs]}", (name, module, inputs, output))

        return left

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if "." in name]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    for name, module, inputs, output in calls.values():
        label = f"layer {name.partition('.')[2]} ({type(module).__name__})"
        try:
            found = written(module, inputs, asked, {})[1](*inputs)
        except Exception:  # `export` says why
            return label
        if not (found - output).abs().max() <= TOLERANCE * max(1, output.abs().max()):
            return label
    return None


def _reason(error: BaseException) -> str:
    """The first sentence of what the exporters have it from."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    return shortened(text.partition(". ")[0].rstrip("."), 200)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing that is printed, logged or warned of reaches the user: it is about the exporters' own code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# torch.export


def _encode_torch(program: torch.export.ExportedProgram, about: Mapping[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: json.dumps(about)})
    return content.getvalue()


def _decode_torch(content: bytes) -> Run:
    program = torch.export.load(io.BytesIO(content)).module()

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = program(*inputs)
        return outputs

    return run


# ONNX


def _encode_onnx(program: torch.export.ExportedProgram, about: Mapping[str, Any]) -> bytes:
    import onnx

    size = sum(weight.nbytes for weight in program.state_dict.values())
    if size >= LARGEST_ONNX:
        text = f"{size / 1e9:.1f} GB of weights, and a .onnx file holds less than 2.1 GB"
        raise ConfigError(f"{text}; --format torch has no such limit")
    aten = torch.ops.aten
    pools = {  # that torch.onnx has no translation of, or a wrong one
        aten.avg_pool2d.default: _sum_of(aten.avg_pool2d),
        aten.avg_pool3d.default: _sum_of(aten.avg_pool3d),
        aten.adaptive_max_pool1d.default: _largest_of(1),
        aten.adaptive_max_pool2d.default: _largest_of(2),
        aten.adaptive_max_pool3d.default: _largest_of(3),
    }
    program = program.run_decompositions(pools)
    name = about.get("output", "output")
    batch = tuple({0: "batch"} for _ in program.graph_signature.user_inputs)
    made = torch.onnx.export(program, dynamic_shapes=batch, output_names=[name], dynamo=True, verbose=False)
    assert made is not None  # what `dynamo` gives back
    model = made.model_proto
    for each in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del each.metadata_props[:]  # our source's folders and lines
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    onnx.helper.set_model_props(model, texts)
    return bytes(model.SerializeToString())


def _sum_of(pool: Any) -> Callable[..., Any]:
    """A pooling with a divisor of its own as one without, times a number: torch.onnx passes the divisor over."""

    def pooled(
        x: Tensor,
        kernel_size: list[int],
        stride: tuple[int, ...] = (),
        padding: int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if divisor_override is None:
            return NotImplemented  # it stays as it is
        means = pool(x, kernel_size, stride, padding, ceil_mode, True)
        return means * (math.prod(kernel_size) / divisor_override)

    return pooled


def _largest_of(dimensions: int) -> Callable[..., Any]:
    """An adaptive max pooling to one number a channel as a maximum over the last dimensions."""

    def pooled(x: Tensor, output_size: list[int]) -> Any:
        if any(side != 1 for side in output_size):
            return NotImplemented  # it stays as it is
        largest, index = x.flatten(-dimensions).max(-1)
        shape = (*x.shape[:-dimensions], *[1] * dimensions)
        return largest.view(shape), index.view(shape)

    return pooled


def _decode_onnx(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = [each.numpy() for each in inputs]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


FORMATS = {
    "onnx": Format(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), _encode_onnx, _decode_onnx, "--format torch may carry it"
    ),
    "torch": Format(
        ".pt2",
        (),
        _encode_torch,
        _decode_torch,
        "it has to take any number of images, and decide nothing by their values",
    ),
}


def show(found: Mapping[str, Any], console: Console) -> None:
    """What was written, what goes in and comes out, and how well it agrees."""
    say(console, f"{found['checkpoint']}, step {found['step']:,}, weights chosen by {found['chosen_by']}")
    for key in ("input", "output"):
        each = found[key]
        say(console, f"{key}: {each['name']}, {each['dtype']} [{', '.join(map(str, each['shape']))}]")
    say(console, "inside: normalisation, and softmax or sigmoid; computes in fp32, whatever it was trained in")
    if found["views"]:
        say(console, f"also inside: {found['views']} views of each image, averaged as in dltrain eval")
    check, output = found["check"], found["output"]["name"]
    others = check["different_predictions"]
    decided = "" if others is None else f", {others} of the predictions differ"
    text = f"{output} differ from torch's by at most {check['largest_difference']:.1g}{decided}"
    say(console, f"checked on {check['images']} {check['of']} images: {text}")
    if check["why_random"]:
        say(console, f"random ones, because the data are not here: {check['why_random']}")
    say(console, f"file: {found['file']} ({found['bytes'] / 1e6:,.1f} MB)")
