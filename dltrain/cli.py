"""The commands: each parses, calls one function and prints.  Errors become exit codes here and nowhere else.

torch is imported inside the commands, so that `dltrain --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer
from rich.console import Console

from dltrain import __version__
from dltrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    DltrainError,
    OutputError,
    PeerLostError,
    Stopped,
    names_memory,
    names_peer,
)

if TYPE_CHECKING:
    from dltrain.config import Config
    from dltrain.distributed import Processes
    from dltrain.rundir import RunFolder

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate and look at classic image classifiers from one YAML file.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show, check and list configs.")
data_app = typer.Typer(no_args_is_help=True, help="List, get and verify data sets.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Plugins = Annotated[
    list[Path],
    typer.Option("--plugin", metavar="FILE", help="A Python file of yours that the run's config names; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
DataRoot = Annotated[str | None, typer.Option("--data-root", metavar="DIR", help="Where the data sets lie.")]
How = Literal["auto", "batched", "batched-processes", "in-turn", "processes"]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]


class _Console(Console):
    """A console whose reader may go away: what is left to say is then said to nobody."""

    def on_broken_pipe(self) -> None:
        _drop_stdout()
        self.quiet = True


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console(to_stderr: bool = False) -> Console:
    return _Console(stderr=to_stderr)


def _show(found: Any, as_json: bool, table: Callable[[Any, Console], None], console: Console) -> None:
    """Prints what a command found, for a program or for a person."""
    if as_json:
        _print_json(found)
    else:
        table(found, console)


def _check_picture(option: str, path: Path | None, what: str) -> None:
    if path and path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {path}: expected a name that ends in .png; {what} as data: --json")
    _check_folder(path)


def _check_folder(path: Path | None) -> None:
    if path and not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; expected a run's folder or a checkpoint")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _say(text: str) -> None:
    """One line on stderr; where it cannot be written, the exit code still says how a command ended."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dltrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, a shipped config's name, or a run to resume.")
    ],
    overrides: Overrides = [],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder; default: runs/<name>/<time>.")
    ] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in this folder (or in --out).")] = False,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Resume also where the end would not have the same bits.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve everything, show the layers, compute one batch, stop.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Measure where a step's time goes, write a trace to --out (default: runs/<name>/profile), stop.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Share each step's images among N processes of this machine."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1000, help="Train the config's seed and the N-1 after it, a run each."),
    ] = None,
    how: Annotated[
        How | None,
        typer.Option(
            metavar="HOW", help="How to train --seeds: auto, batched, batched-processes, in-turn or processes."
        ),
    ] = None,
    plugin: Plugins = [],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and nothing before it.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, and evaluate it on the test split at the end."""
    overrides = [*overrides, *([f"train.device={device}"] if device else [])]
    if seeds:
        others = {"--resume": resume, "--dry-run": dry_run, "--profile": profile, "--processes": (processes or 1) > 1}
        if other := next((option for option, given in others.items() if given), None):
            raise ConfigError(f"--seeds {seeds} begins whole runs of one process each: leave out {other}")
        if not _is_alone():
            raise ConfigError(f"--seeds {seeds}: each run is of one process: start it without torchrun")
    elif how:
        raise ConfigError(f"--how {how} says how to train several seeds: it needs --seeds")
    if allow_inexact and not resume:
        raise ConfigError("--allow-inexact says how to resume: it needs --resume")
    if plugin and not resume:
        raise ConfigError("--plugin is for --resume; a config names its plugins itself: plugins: [my_module.py]")
    if resume and dry_run:
        raise ConfigError("--dry-run keeps nothing and --resume goes on with a run: give one of them")
    if profile and (resume or dry_run):
        raise ConfigError(f"--profile and {'--resume' if resume else '--dry-run'}: give one of them")
    from dltrain import launch

    if (processes or 1) > 1 and not launch.is_started_here():
        if profile or dry_run:
            raise ConfigError(
                f"--processes: {'--profile' if profile else '--dry-run'} looks at one process: leave it out"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--processes: torchrun has started the processes: leave it out")
        if not resume:
            _load(config, overrides)  # what is wrong with it is said before anything is started
        raise typer.Exit(launch.launch(context.obj, processes or 1))
    if resume:
        _resume(config, overrides, out, allow_inexact, plugin, quiet, as_json)
        return
    loaded = _load(config, overrides)
    notes = _console(to_stderr=as_json)
    if seeds:
        from dltrain import seeds as several

        _show_seeds(several.start(loaded, seeds, how or "auto", out, notes, quiet), as_json, notes)
        return
    if dry_run:
        _dry_run(loaded, notes, as_json)
        return
    if profile:
        _profile(loaded, out or Path("runs") / loaded.name / "profile", notes, quiet, as_json)
        return

    from dltrain import rundir

    def folder() -> rundir.RunFolder:
        return rundir.RunFolder(out, resume=False) if out else rundir.create(Path("runs"), loaded.name)

    with _together(folder, quiet) as (held, process, still):
        from dltrain import runs, tables

        found = runs.start(loaded, held, notes, still, process)
        if process.first:
            _show(found, as_json, tables.result, notes)


def _show_seeds(ended: tuple[Any, DltrainError | None], as_json: bool, notes: Console) -> None:
    """Prints what several seeds came to, and raises what went wrong with some of them."""
    found, wrong = ended
    from dltrain import tables

    _show(found, as_json, tables.seeds, notes)
    if wrong:
        raise wrong


@contextlib.contextmanager
def _together(folder: Callable[[], RunFolder], quiet: bool) -> Iterator[tuple[RunFolder, Processes, bool]]:
    """The run's folder, held by the first of the processes that train it, and whether this one is to be quiet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with contextlib.closing(folder()) as held:
            from dltrain import distributed

            yield held, distributed.ALONE, quiet
        return
    from dltrain import distributed, rundir

    with distributed.joined() as processes:
        if processes.first:
            with contextlib.closing(folder()) as held:
                processes.tell(held.path)
                yield held, processes, quiet
        else:
            yield rundir.Reader(processes.tell()), processes, True


def _resume(
    config: str,
    overrides: list[str],
    out: Path | None,
    allow_inexact: bool,
    plugins: list[Path],
    quiet: bool,
    as_json: bool,
) -> None:
    from dltrain import config as configs
    from dltrain import launch, rundir

    path = out or Path(config)
    if not path.is_dir():
        text = "expected a run's folder: dltrain train --resume RUN, or dltrain train CONFIG --out RUN --resume"
        raise ConfigError(f"{path}: {text}")
    wanted = _load(config, overrides) if out else None
    trusted = [*plugins, *(Path(path) for path in wanted.plugins)] if wanted else plugins
    notes = _console(to_stderr=as_json)

    def given(before: dict[str, Any]) -> Config:
        after = configs.from_plain(before, str(path), overrides, trusted)
        if wanted and (others := runs.differences(after.plain(), wanted.plain())):
            mend = "give them by --set, or resume by `dltrain train --resume` with the folder alone"
            raise ConfigError(f"{config}: is not what this run was started with ({'; '.join(others[:5])}): {mend}")
        return after

    if rundir.holds_seeds(path):
        if not _is_alone():
            raise ConfigError(f"{path}: holds the runs of several seeds, of one process each: resume without others")
        from dltrain import runs, seeds

        ended = seeds.resume(path, given, allow_inexact, trusted, notes, quiet)
        if not launch.is_started_here():
            _show_seeds(ended, as_json, notes)
        return
    with _together(lambda: rundir.RunFolder(path, resume=True), quiet) as (folder, process, still):
        from dltrain import runs, tables

        found = runs.resume(folder, given, notes, still, allow_inexact, trusted, process)
        if process.first:
            _show(found, as_json, tables.result, notes)


def _load(config: str, overrides: list[str]) -> Config:
    from dltrain import config as configs
    from dltrain import shipped

    return configs.load(shipped.find(config), overrides)


def _dry_run(config: Config, notes: Console, as_json: bool) -> None:
    from dltrain import tables
    from dltrain.dryrun import dry_run

    found = dry_run(config, lambda text: tables.say(notes, text))
    _show(found, as_json, tables.dry_run, notes)


def _profile(config: Config, folder: Path, notes: Console, quiet: bool, as_json: bool) -> None:
    from dltrain import profiling, tables

    found = profiling.profile(config, folder, lambda text: None if quiet else tables.say(notes, text))
    _show(found, as_json, tables.profile, notes)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder or a checkpoint file.")],
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, val or test.")] = "test",
    positive: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Judge this class, a name or number, against the rest too.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="Its images are those of at least this probability; default: 0.5.")
    ] = None,
    type_1_error: Annotated[
        float | None,
        typer.Option("--type-1-error", metavar="RATE", help="Choose the lowest threshold with at most this error."),
    ] = None,
    type_2_error: Annotated[
        float | None,
        typer.Option("--type-2-error", metavar="RATE", help="Choose the highest threshold with at most this error."),
    ] = None,
    precision: Annotated[
        float | None, typer.Option(metavar="P", help="Choose the lowest threshold with at least this precision.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(metavar="R", help="Choose the highest threshold with at least this recall.")
    ] = None,
    choose_on: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Where to choose it; default: val, where images are held out.")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the ROC and PR curves of --positive, else of each class.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="CSV", help="Write each image's prediction to this file.")] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data_root: DataRoot = None,
    plugin: Plugins = [],
    as_json: Json = False,
) -> None:
    """Evaluate a trained model.  It needs no config, and runs no code from the file."""
    if split not in ("train", "val", "test"):
        raise ConfigError(f"--split {split}: expected train, val or test")
    from dltrain import thresholds

    rates = {"type_1_error": type_1_error, "type_2_error": type_2_error, "precision": precision, "recall": recall}
    question = thresholds.asked(positive, {"threshold": threshold, **rates}, choose_on)
    _check_picture("--curves", curves, "the curves")
    _check_folder(out)
    _check_checkpoint(checkpoint)

    from dltrain import figures, rundir, tables, trained

    notes = _console(to_stderr=as_json)
    model = trained.load(checkpoint, device, tables.warn, plugin)
    if question or curves:
        thresholds.check(question, model)  # before any image is read
    scores, found = trained.judge(model, split, data_root, _say)
    if out:
        rundir.write_atomically(out, trained.predictions_csv(model, found).encode())
    if question or curves:
        more, drawn = thresholds.answer(question, model, split, found, data_root, tables.warn)
        scores |= {**more, "picture": str(curves) if curves else None}
        if curves:
            rundir.write_atomically(curves, figures.roc_and_pr(scores, drawn))
    _show(scores, as_json, tables.evaluation, notes)


@app.command(name="predict")
def predict_images(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder or a checkpoint file.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Show so many of the likeliest classes.")] = 3,
    fit: Annotated[
        str | None, typer.Option(metavar="FIT", help="Other shapes: crop, pad or stretch; default: as in training.")
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Take dark for light, as in a scan of digits.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the images as the model sees them to this file.")
    ] = None,
    saliency: Annotated[bool, typer.Option("--saliency", help="Draw what each prediction depends on, too.")] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    plugin: Plugins = [],
    as_json: Json = False,
) -> None:
    """Say what a trained model takes images for: files of any size and mode, or folders of them."""
    from dltrain.data.pictures import Fit

    if fit not in (None, *get_args(Fit)):
        raise ConfigError(f"--fit {fit}: expected {', '.join(get_args(Fit))}")
    if saliency and not out:
        raise ConfigError("--saliency is part of a picture: give its name by --out PICTURE.png")
    _check_picture("--out", out, "the predictions")
    _check_checkpoint(checkpoint)

    from dltrain import figures, predict, rundir, tables, trained

    notes = _console(to_stderr=as_json)
    files = predict.find(images)
    model = trained.load(checkpoint, device, _say, plugin)
    found = predict.predict(model, files, fit=cast(Fit | None, fit), invert=invert, report=_say)
    plain = {**predict.plain(model, found, top), "picture": str(out) if out else None}
    if out:
        captions = predict.captions(plain["images"][: len(found.images)])
        maps = predict.saliency(model, found) if saliency else None
        rundir.write_atomically(out, figures.predictions_picture(found.images, captions, maps))
        if len(found.files) > len(captions):
            _say(f"{out}: shows the first {len(captions)} of {len(found.files):,} images")
    _show(plain, as_json, tables.predictions, notes)
    if found.unreadable:
        raise predict.not_readable(found.unreadable)


@app.command(name="report")
def make_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="The folder of a run, or of several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="HTML", help="Where it goes; default: RUN/report.html, of several ./report.html."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data_root: DataRoot = None,
    plugin: Plugins = [],
) -> None:
    """Write one HTML page on runs: curves, scores of each class, worst mistakes, settings, how to reproduce."""
    _check_folder(out)
    from dltrain import report

    print(report.make(runs, out, device, data_root, plugin, _say))


@app.command(name="export")
def export_model(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder or a checkpoint file.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="onnx, or torch for torch.export.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where it goes, .onnx or .pt2; default: beside the checkpoint.")
    ] = None,
    plugin: Plugins = [],
    as_json: Json = False,
) -> None:
    """Write a trained model as one file for other programs: bytes of images in, probabilities out; and check it."""
    _check_folder(out)
    _check_checkpoint(checkpoint)

    from dltrain import export, tables, trained

    notes = _console(to_stderr=as_json)
    export.check_asked(format, out)
    _show(export.export(trained.load(checkpoint, "cpu", tables.warn, plugin), format, out), as_json, export.show, notes)


@app.command(name="lr-find")
def find_learning_rate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a shipped config's name.")],
    overrides: Overrides = [],
    lowest: Annotated[float, typer.Option(metavar="LR", help="The first learning rate.")] = 1e-6,
    highest: Annotated[float, typer.Option(metavar="LR", help="The last one.")] = 10.0,
    steps: Annotated[int, typer.Option(metavar="N", min=10, help="Steps from the first to the last.")] = 200,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the figure goes; default: runs/<name>/lr-find.png.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Try learning rates from low to high in one short run, and suggest one from where the loss falls."""
    if not 0 < lowest < highest < float("inf"):
        raise ConfigError(f"--lowest {lowest:g} --highest {highest:g}: expected 0 < lowest < highest")
    loaded = _load(config, [*overrides, *([f"train.device={device}"] if device else [])])
    from dltrain import figures, rundir, tables
    from dltrain.lr_find import find

    notes = _console(to_stderr=as_json)
    figure = out or Path("runs") / loaded.name / "lr-find.png"
    if figure.is_dir():
        raise OutputError(f"{figure}: is a folder; expected the name of a PNG file")
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{figure.parent}: {error.strerror} (errno {error.errno})") from None
    found = find(loaded, lowest, highest, steps, lambda text: tables.say(notes, text))
    rundir.write_atomically(figure, figures.learning_rates(found))
    _show({**found, "figure": str(figure)}, as_json, tables.learning_rate, notes)


@app.command(name="gradcheck")
def check_gradients(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a shipped config's name.")],
    overrides: Overrides = [],
    weights: Annotated[int, typer.Option(metavar="N", min=1, help="Weights of each parameter that are tried.")] = 4,
    as_json: Json = False,
) -> None:
    """Compare what the backward pass computes with differences of the loss: exit code 0 means that they agree."""
    loaded = _load(config, overrides)
    from dltrain import tables
    from dltrain.gradcheck import gradcheck

    notes = _console(to_stderr=as_json)
    found = gradcheck(loaded, weights, lambda text: tables.say(notes, text))
    _show(found, as_json, tables.gradients, notes)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command(name="bench")
def bench_recipes(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE…", help="YAML files or shipped names; default: those shipped to be fast."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="How many seeds, from the config's on.")] = 3,
    target: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Report the time to this test accuracy: 0.94, or 94 for 94 %.")
    ] = None,
    overrides: Overrides = [],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the runs are kept; default: they are not.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw accuracy against seconds.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run recipes over several seeds: accuracy with its interval, seconds cold and warm, share of the arithmetic."""
    if target is not None and not 0 < target <= 100:
        raise ConfigError(f"--target {target:g}: expected a share of the test images, such as 0.94, or 94 for 94 %")
    _check_picture("--picture", picture, "the numbers")
    overrides = [*overrides, *([f"train.device={device}"] if device else [])]

    from dltrain import bench, figures, rundir, tables

    notes = _console(to_stderr=as_json)
    paths = bench.plan(recipes or [], overrides, out, notes)
    share = target / 100 if target and target > 1 else target
    found, wrong = bench.bench(paths, overrides, seeds=seeds, target=share, out=out, console=notes)
    if found["recipes"]:
        if picture:
            rundir.write_atomically(picture, figures.bench(found))
        _show({**found, "picture": str(picture) if picture else None}, as_json, tables.bench, notes)
    if wrong:
        raise wrong


@app.command(name="compare")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|FOLDER…", help="Finished runs, or folders of them.")],
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Compare the scores of val or test.")] = "test",
    figure: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw each group's seeds; of two runs the images that they disagree on."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data_root: DataRoot = None,
    plugin: Plugins = [],
    as_json: Json = False,
) -> None:
    """Say what runs differ in, and whether their results differ by more than chance: over seeds, or image by image."""
    if split not in ("val", "test"):
        raise ConfigError(f"--split {split}: expected val or test")
    _check_picture("--figure", figure, "the numbers")

    from dltrain import compare, rundir, tables

    notes = _console(to_stderr=as_json)
    found, draw = compare.compare(runs, split, device=device, data_root=data_root, plugins=plugin, warn=tables.warn)
    if figure and draw:
        rundir.write_atomically(figure, draw())
    elif figure:
        tables.warn("the two say the same of every image: there is no figure to draw")
    _show({**found, "figure": str(figure) if figure and draw else None}, as_json, tables.comparison, notes)


@app.command(name="vary")
def vary_keys(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a shipped config's name.")],
    grid: Annotated[list[str], typer.Argument(metavar="KEY=V1,V2…", help="Values of one key, or of two for a grid.")],
    overrides: Overrides = [],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The runs' folder, old or new; default: runs/<name>/vary-<time>."),
    ] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and nothing before it.")] = False,
    as_json: Json = False,
) -> None:
    """Train a config with each of several values, from the same initial weights, and draw their losses in one figure.

    The same command with the same --out goes on where it was stopped, and trains no value twice.
    """
    overrides = [*overrides, *([f"train.device={device}"] if device else [])]
    from dltrain import figures, rundir, shipped, tables, vary

    notes = _console(to_stderr=as_json)
    points = vary.plan(shipped.find(config), grid, overrides, out)
    found, wrong = vary.vary(points, notes, quiet)
    if found["runs"]:
        figure = Path(found["out"]) / "vary.png"
        rundir.write_atomically(figure, figures.vary(found, [vary.trace(row) for row in found["runs"]]))
        _show({**found, "figure": str(figure)}, as_json, tables.vary, notes)
    if isinstance(wrong, Stopped):
        settings = (part for each in overrides for part in ("--set", each))
        command = shlex.join(["dltrain", "vary", config, *grid, *settings, "--out", found["out"]])
        raise Stopped(f"{wrong}; go on with: {command}", wrong.exit_code - 128)
    if wrong:
        raise wrong


@app.command(name="sweep")
def sweep_settings(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file or a shipped sweep's name.")],
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A database that several machines share; default: SQLite in the folder."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the runs go; default: runs/<name>.")] = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and nothing before it.")] = False,
    as_json: Json = False,
) -> None:
    """Search settings: start the same command again, here or elsewhere, to go on or to help."""
    from dltrain import sweepfile

    plan = sweepfile.load(sweepfile.find(sweep))
    try:
        from dltrain import sweep as sweeping
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ConfigError("dltrain sweep needs Optuna: pip install 'dltrain[sweep]'") from None
    from dltrain import tables

    notes = _console(to_stderr=as_json)
    options = {"--storage": storage, "--out": out, "--device": device}
    given = [part for option, value in options.items() if value for part in (option, str(value))]
    go_on = shlex.join(["dltrain", "sweep", sweep, *given])
    folder = out or Path("runs") / plan.name
    _show(sweeping.sweep(plan, folder, storage, device, notes, quiet, go_on), as_json, tables.sweep, notes)


@app.command(name="verify-resume")
def verify_resume(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a shipped config's name.")],
    overrides: Overrides = [],
    kills: Annotated[int, typer.Option(metavar="N", min=1, help="How often the second run is killed.")] = 3,
    images: Annotated[
        int | None, typer.Option(metavar="N", min=10, help="Train on so many images alone, to be quick.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where both runs are kept; default: they are not.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train once without a stop and once killed and resumed, and compare the ends: exit code 0 means the same bits."""
    overrides = [*overrides, *([f"train.device={device}"] if device else [])]
    loaded = _load(config, overrides)
    from dltrain import shipped, tables
    from dltrain import verify_resume as proof

    if images:
        overrides += proof.subset(loaded, images)
        loaded = _load(config, overrides)
    notes = _console(to_stderr=as_json)
    with contextlib.nullcontext(str(out)) if out else tempfile.TemporaryDirectory() as folder:
        found = proof.verify(
            str(shipped.find(config)), overrides, loaded, kills, Path(folder), lambda text: tables.say(notes, text)
        )
    _show(found, as_json, tables.resume_proof, notes)
    raise typer.Exit(0 if found["same"] else 1)


@app.command(name="check-gpu")
def check_gpu(
    allow_cpu: Annotated[bool, typer.Option("--allow-cpu", help="Exit with 0 where there is no GPU.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 5 where there is a warning.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only what decides whether a device can train.")] = False,
    stress: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=1, help="Also load each GPU for so long, and watch it.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show how busy and hot the GPUs are, until Ctrl-C.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also show the cards' UUIDs and paths in your home.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report for an issue.")] = False,
    as_json: Json = False,
) -> None:
    """Say what devices are here, and try each: exit code 0 means that a GPU can train, 5 that none can."""
    from dltrain.gpu import check, report
    from dltrain.gpu import watch as watching
    from dltrain.gpu.worker import Worker

    if quick + watch + (stress is not None) > 1 or markdown + as_json + watch > 1:
        raise ConfigError("check-gpu: one of --quick, --stress and --watch, and one of --markdown, --json and --watch")
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            report.follow(watching.watch(1.0), _console())
        return
    with Worker() as worker, _console(to_stderr=True).status("check-gpu") as status:
        found = check.check(worker, quick, stress or 0, status.update)
    if not full:
        found = report.hide(found)
    if markdown:
        print(report.markdown(found))
    else:
        _show(found, as_json, report.render, _console())
    raise typer.Exit(check.exit_code(found, allow_cpu, strict))


@app.command(name="list")
def list_components(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND|FOLDER", help="model, layer, loss, optim, …, or a folder of runs; default: all."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference documentation.")] = False,
    as_json: Json = False,
) -> None:
    """List every component that a config can name, with its arguments; or the runs in a folder and how they stand."""
    from dltrain import overview, reference, registry, tables

    if kind is not None and kind not in registry.KINDS and Path(kind).is_dir():
        if markdown:
            raise ConfigError(f"list {kind} --markdown: is for components; of runs there is --json")
        rows = overview.rows(Path(kind), tables.warn)
        if rows or as_json:
            _show(rows, as_json, tables.runs, _console())
        else:
            print(f"no runs below {kind}")
        return
    if as_json:
        raise ConfigError("list --json: is for the runs in a folder; of components there is `dltrain config schema`")
    if markdown:
        print(reference.markdown(), end="")
    else:
        reference.show(kind, _console())


@config_app.command(name="show")
def config_show(config: Annotated[str, typer.Argument(metavar="CONFIG")], overrides: Overrides = []) -> None:
    """Print a config with every default filled in."""
    print(_load(config, overrides).yaml(), end="")


@config_app.command(name="check")
def config_check(
    files: Annotated[list[str], typer.Argument(metavar="CONFIG…")],
    overrides: Overrides = [],
) -> None:
    """Check configs and do nothing else."""
    wrong = []
    for config in files:
        try:
            _load(config, overrides)
        except ConfigError as error:
            wrong.append(str(error))
        else:
            print(f"{config}: ok")
    if wrong:
        raise ConfigError("\n".join(wrong))


@config_app.command(name="schema")
def config_schema() -> None:
    """Print a JSON schema, which gives an editor completion and checks."""
    from dltrain import schema

    _print_json(schema.schema())


@config_app.command(name="list")
def config_list() -> None:
    """List the configs that come with dltrain."""
    from dltrain import shipped, tables

    tables.configs(
        [(name, shipped.headline(shipped.folder() / f"{name}.yaml")) for name in shipped.names()], _console()
    )


@data_app.command(name="list")
def data_list(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List the data sets, and whether they are here."""
    from dltrain import catalogue, tables

    rows = catalogue.presence(data_root)
    _show(rows, as_json, tables.data, _console())


@data_app.command(name="get")
def data_get(names: Annotated[list[str], typer.Argument(metavar="NAME…")], data_root: DataRoot = None) -> None:
    """Download data sets that are not here yet."""
    from dltrain import catalogue

    for name in names:
        print(catalogue.get(name, data_root, _say))


@data_app.command(name="verify")
def data_verify(names: Annotated[list[str], typer.Argument(metavar="NAME…")], data_root: DataRoot = None) -> None:
    """Read data sets anew and compare every file with its published checksum."""
    from dltrain import catalogue

    for name in names:
        print(catalogue.verify(name, data_root, _say))


def main() -> None:
    """Runs the command line; every way out of it passes here."""
    threading.excepthook = _thread_failed
    from dltrain import launch

    if not _is_alone() or launch.is_started_here():
        launch.follow()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  for as long as the process lives
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # all is written by now, and taking torch apart would cost nearly a second


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Nothing for the thread that writes TensorBoard's file: a run is told of the same error, and says it once."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _is_first() -> bool:
    """Whether this process is the one that speaks, of those that train together."""
    return _is_alone() or os.environ.get("RANK") == "0"


def _failed(error: DltrainError) -> int:
    """Says an error, once: what all processes of a run meet, the first one says."""
    from dltrain import launch

    lost = isinstance(error, PeerLostError)
    if lost and launch.is_started_here():
        return launch.LOST  # whoever started the processes knows which has gone, and why
    own = isinstance(error, DataError | DeviceError) and not lost  # what another machine may not meet
    if _is_first() or own or launch.is_started_here():  # which shows the others' only where the first one has none
        for line in str(error).splitlines():
            _say(f"error: {line}")
    return error.exit_code


def run(arguments: list[str]) -> int:
    """Runs one command; returns its exit code.  A traceback means a bug of ours."""
    # click's, or the copy of it inside newer versions of typer
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        code = app(arguments, prog_name="dltrain", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Stopped as stopped:  # as asked to: no error
        if _is_first():
            _say(str(stopped))
        return stopped.exit_code
    except DltrainError as error:
        return _failed(error)
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped; a run that was training goes on with: dltrain train --resume RUN")
        return 130
    except BrokenPipeError:  # `| head -1`: whoever read has read enough
        _drop_stdout()
        return 0
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        _drop_stdout()  # click makes this of a broken pipe
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT):
            raise
        if error.filename is None:
            _drop_stdout()
        _say(f"error: {error.filename or 'standard output'}: {error.strerror} (errno {error.errno})")
        return OutputError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_alone() and names_peer(error):
            return _failed(PeerLostError("another process of this run has gone, and this one ends with it"))
        if not names_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "Python could not allocate any more"
        mend = "lower descent.micro_batch_size or data.limit, take a smaller model, or another --device"
        _say(f"error: out of memory: {reason}: {mend}")
        return DeviceError.exit_code
    except usage_error as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        if message:  # none where the help was the answer
            _say(f"error: {message}; see dltrain --help")
        return 2
