"""TensorBoard's switches: what each shows is what the run holds, and none of them changes the run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run as Command
from PIL import Image
from sklearn.metrics import precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector import metadata as projector_metadata
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util import tensor_util
from torch import nn

from dltrain import board, checkpoint, cli, figures, rundir, runs
from dltrain import config as configs
from dltrain.board import Board
from dltrain.build import build
from dltrain.data.dataset import Split
from dltrain.registry import Item, entries, find
from dltrain.state import Run
from dltrain.yamlfile import parse

SWITCHES = ("pictures", "weight_histograms", "gradient_histograms", "filters", "pr_curves", "embedding")
# dropout, batch norm, momentum that looks ahead, clipping, a frozen layer: what a careless look would change or miss
CONFIG = """
data: {name: digits, val: 200, limit: 700}
model: {name: mlp, hidden: [24, 16], dropout: 0.2, batchnorm: true, frozen: [1.*]}
optim: {name: sgd, lr: 0.1, momentum: 0.9, nesterov: true}
descent: {batch_size: 48}
train: {epochs: 5, log_every_steps: 1, clip_norm: 1.0, choose_by: last}
"""
STEPS = 11  # an epoch's: 500 images in batches of 48


def switched(**on: bool) -> str:
    return json.dumps({name: on.get(name, False) for name in SWITCHES})


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("images", "histograms", "tensors"), 0))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every switch on."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "small.yaml").write_text(CONFIG)
    every = f"tensorboard={switched(**dict.fromkeys(SWITCHES, True))}"
    assert cli.run(["train", str(folder / "small.yaml"), "--out", str(folder / "run"), "-q", "--set", every]) == 0
    return folder / "run"


def test_no_switch_changes_a_bit_of_the_run(dltrain: Command, shown: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    assert dltrain("train", path, "--out", "run", "-q", "--set", f"tensorboard={switched()}").code == 0
    (tensors, _), (tensors_, _) = (checkpoint.read(rundir.steps(run)[0]) for run in (shown, Path("run")))
    assert tensors.keys() == tensors_.keys()  # the generator's state among them
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_[name])] == []
    tags = read(Path("run")).Tags()
    assert tags["histograms"] == []
    assert tags["images"] == []
    assert not tags["graph"]
    assert not [tag for tag in tags["tensors"] if "against" in tag]
    assert not Path("run/projector_config.pbtxt").exists()


def test_histograms_of_weights(shown: Path) -> None:
    events = read(shown)
    state, _ = checkpoint.read(rundir.steps(shown)[0])
    for name in ("1.weight", "5.weight", "9.bias", "2.weight"):
        weights = state[f"model.{name}"].double().flatten()
        found = events.Histograms(f"weights/{name}")
        assert [event.step for event in found] == [STEPS * epoch for epoch in range(1, 6)]
        last = found[-1].histogram_value
        assert last.num == len(weights)
        assert (last.min, last.max) == (weights.min(), weights.max())
        assert last.sum == pytest.approx(weights.sum().item())
        assert last.sum_squares == pytest.approx(weights.square().sum().item())
        below = [int((weights < limit).sum()) for limit in last.bucket_limit[:-1]]  # its last takes the largest in
        assert np.cumsum(last.bucket).tolist() == [*below, len(weights)]
        assert len(last.bucket) <= board.BINS + 1


def test_histograms_of_gradients_add_up_to_the_norm_in_the_log(shown: Path) -> None:
    events = read(shown)
    lines = {line["step"]: line for line in rundir.records(shown) if line["kind"] == "step"}
    tags = [tag for tag in events.Tags()["histograms"] if tag.startswith("gradients/")]
    assert "gradients/5.weight" in tags
    assert "gradients/1.weight" not in tags  # frozen
    for epoch in range(5):
        found = [events.Histograms(tag)[epoch] for tag in tags]
        assert {event.step for event in found} == {STEPS * (epoch + 1)}
        norm = sum(event.histogram_value.sum_squares for event in found) ** 0.5
        assert norm == pytest.approx(min(lines[STEPS * (epoch + 1)]["gradient_norm"], 1.0), rel=1e-4)  # clipped to 1


@pytest.mark.parametrize("name", [entry.name for entry in entries("optim") if "closure" not in entry.facts])
def test_no_optimizer_changes_the_gradient_that_a_histogram_shows(name: str) -> None:
    wanted = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}
    known = find(name, "optim").arguments.model_fields
    settings = {key: value for key, value in wanted.items() if key in known}
    parameter = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    before = parameter.detach().clone()
    optimizer = Item("optim").read({name: settings})([parameter])
    for _ in range(2):
        parameter.grad = torch.arange(24.0).view(6, 4) / 24
        optimizer.step()
        assert torch.equal(parameter.grad, torch.arange(24.0).view(6, 4) / 24)
    assert not torch.equal(parameter, before)


# What follows needs no training: the board is called as the log calls it.


def plain(text: str, *overrides: str) -> configs.Config:
    return configs.check(parse(text, "test"), ["name=test", *overrides])


class Shown:
    """A board of an untrained run, and what a test asks of it."""

    def __init__(
        self, folder: Path, config: configs.Config, change: Callable[[Any], Any] = lambda setup: setup
    ) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.run: Run = runs.new_run(change(build(config, self.notes.append)))
        self.board = Board(folder, self.run, self.notes.append)

    def after_epoch(self) -> EventAccumulator:
        self.run.progress.epoch += 1
        self.board.epoch(None, lambda: self.run.setup.normalise(self.run.setup.data.train.images[:8]))
        return self.read()

    def at_the_end(self) -> EventAccumulator:
        setup = self.run.setup
        scores = {name: setup.evaluate(split) for name, split in setup.data.splits.items()}
        self.outputs = scores["test"].outputs
        self.board.end(scores, self.run.global_step)
        return self.read()

    def read(self) -> EventAccumulator:
        self.board.flush()
        return read(self.folder)


DIGITS = """
data: {name: digits, limit: 64}
descent: {batch_size: 16}
optim: {name: sgd, lr: 0.1}
model: {name: mlp, hidden: [12]}
train: {epochs: 6, precision: fp32}
"""


def test_filters_are_shown_while_they_change_most(shown: Path) -> None:
    images = read(shown).Images("filters/1")
    assert [event.step for event in images] == [STEPS * epoch for epoch in (1, 2, 4, 5)]  # 5: the chosen weights


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def test_a_linear_layer_s_rows_are_pictures_of_the_weights(tmp_path: Path) -> None:
    shown = Shown(tmp_path, plain(DIGITS, "model=perceptron"))
    (image,) = shown.after_epoch().Images("filters/1")
    found = pixels(image.encoded_image_string)[..., 0]  # TensorBoard's pictures have three channels
    weight = shown.run.setup.model[1].weight.detach().numpy()  # [10, 64]
    assert found.shape == (3 * 9 - 1, 4 * 9 - 1)
    for row in range(10):
        tile = found[row // 4 * 9 :, row % 4 * 9 :][:8, :8]
        expected = 127.5 + 127.5 * weight[row].reshape(8, 8) / np.abs(weight[row]).max()
        assert np.abs(tile - expected).max() <= 1


@pytest.mark.parametrize(("channels", "tiles", "shape"), [(1, 5, (1, 2, 3)), (3, 5, (3, 2, 3)), (4, 20, (1, 2, 3))])
def test_filters_of_any_number_of_channels(channels: int, tiles: int, shape: tuple[int, ...]) -> None:
    filters = torch.randn(5, channels, 2, 3, generator=torch.Generator().manual_seed(0))
    filters[1] = 0
    picture = figures.filter_picture(filters)
    columns = {5: 3, 20: 5}[tiles]
    assert picture.shape == (shape[0], -(-tiles // columns) * 3 - 1, columns * 4 - 1)
    pictures = filters if channels in (1, 3) else filters.reshape(20, 1, 2, 3)
    for place, each in enumerate(pictures):
        top, left = place // columns * 3, place % columns * 4
        tile = picture[:, top : top + 2, left : left + 3]
        peak = each.abs().max() or 1
        torch.testing.assert_close(tile, (each / peak + 1) / 2)


def test_a_picture_shows_64_filters_at_most() -> None:
    assert figures.filter_picture(torch.randn(100, 3, 3, 3)).shape == (3, 8 * 4 - 1, 8 * 4 - 1)


def conv(channels: int, **settings: Any) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Conv2d(channels, 6, 3, **settings))


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        (conv(2), "1", (6, 2, 3, 3)),
        (conv(4, groups=2), "1", (6, 2, 3, 3)),
        (nn.Sequential(conv(2), nn.Linear(5, 3)), "0.1", (6, 2, 3, 3)),
        (nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 5, 7)), "1", (7, 2, 4, 5)),
        (nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 7)), None, None),
        (nn.Sequential(nn.Flatten()), None, None),
        (nn.Sequential(nn.Linear(40, 7).bfloat16()), "0", (7, 2, 4, 5)),
    ],
)
def test_which_layer_s_filters(model: nn.Module, name: str | None, shape: tuple[int, ...] | None) -> None:
    found = board.first_filters(model, (2, 4, 5))
    if name is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0], found[1].shape, found[1].dtype) == (name, shape, torch.float32)
        torch.testing.assert_close(found[1].flatten(), model.get_submodule(name).weight.detach().float().flatten())


def test_filters_of_a_convolution_with_a_list_of_connections(tmp_path: Path) -> None:
    layers = "[{conv: {out: 2, kernel: 3, connections: [[0], [0]]}}, flatten, {linear: classes}]"
    model = Shown(tmp_path, plain(DIGITS, f"model={{name: cnn, layers: {layers}}}")).run.setup.model
    name, filters = board.first_filters(model, (1, 8, 8))
    assert torch.equal(filters[:, 0], model.get_submodule(name).weight.detach())


def test_precision_and_recall_are_sklearn_s(tmp_path: Path) -> None:
    shown = Shown(tmp_path, plain(DIGITS))
    with torch.no_grad():
        shown.run.setup.model[3].weight.mul_(40)  # for probabilities from 0 to 1
    events = shown.at_the_end()
    shares, labels = shown.outputs.softmax(1).numpy(), shown.run.setup.data.test.labels.numpy()
    for number in (3, 5):
        (event,) = events.Tensors(f"test/{number} against the rest")
        curve = tensor_util.make_ndarray(event.tensor_proto)  # [6, thresholds]
        for place in (0, 5, 30, 100):
            guesses = shares[:, number] >= np.float32(place) / 126
            assert guesses.any()
            hits = int((guesses & (labels == number)).sum())
            assert (curve[0, place], curve[1, place]) == (hits, guesses.sum() - hits)
            assert curve[4, place] == pytest.approx(precision_score(labels == number, guesses))
            assert curve[5, place] == pytest.approx(recall_score(labels == number, guesses))


def test_the_curves_of_a_sigmoid_and_of_a_class_without_test_images(tmp_path: Path) -> None:
    def fives_alone(setup: Any) -> Any:
        test = setup.data.test
        object.__setattr__(setup.data, "test", test.subset((test.labels == 1).nonzero()[:, 0]))
        return setup

    config = plain(DIGITS, "data.classes=[3, 5]", "model.output=sigmoid", "loss=bce")
    shown = Shown(tmp_path, config, fives_alone)
    events = shown.at_the_end()
    assert [tag for tag in events.Tags()["tensors"] if "against" in tag] == ["test/5 against the rest"]
    (event,) = events.Tensors("test/5 against the rest")
    hits = tensor_util.make_ndarray(event.tensor_proto)[0]
    shares = shown.outputs[:, 0].sigmoid().numpy()
    assert hits.tolist() == [(np.floor(shares * 126) >= place).sum() for place in range(127)]
    assert shown.notes == []


def write_embedding(folder: Path) -> tuple[Shown, np.ndarray, list[list[str]]]:
    shown = Shown(folder, plain(DIGITS, f"tensorboard={switched(embedding=True)}"))
    shown.at_the_end()
    assert shown.notes == []
    vectors = np.loadtxt(folder / "embedding/vectors.tsv", delimiter="\t", ndmin=2)
    labels = (folder / "embedding/labels.tsv").read_text().splitlines()
    return shown, vectors, [line.split("\t") for line in labels]


def test_the_embedding_is_what_enters_the_last_linear_layer(tmp_path: Path) -> None:
    shown, vectors, labels = write_embedding(tmp_path)
    setup = shown.run.setup
    model, test = setup.model, setup.data.test
    with torch.no_grad():
        expected = torch.relu(model[1](setup.normalise(test.images).flatten(1)))
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)
    rows = zip(test.labels.tolist(), model[3](expected).argmax(1).tolist(), strict=True)
    assert labels == [["class", "predicted"], *[[str(label), str(guess)] for label, guess in rows]]
    assert model.training
    assert [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks] == []


def test_at_most_so_many_are_embedded_from_all_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "EMBEDDED", 100)
    shown, vectors, labels = write_embedding(tmp_path)
    test = shown.run.setup.data.test
    assert len(vectors) == 100
    places = [place * len(test) // 100 for place in range(100)]
    assert [row[0] for row in labels[1:]] == [str(test.labels[place].item()) for place in places]


def test_the_projector_finds_what_the_embedding_writes(tmp_path: Path) -> None:
    from google.protobuf import text_format

    write_embedding(tmp_path)
    text = (tmp_path / projector_metadata.PROJECTOR_FILENAME).read_text()
    (embedding,) = text_format.Parse(text, ProjectorConfig()).embeddings
    for path in (embedding.tensor_path, embedding.metadata_path, embedding.sprite.image_path):
        assert (tmp_path / path).is_file()
    assert list(embedding.sprite.single_image_dim) == [8, 8]
    assert Image.open(tmp_path / embedding.sprite.image_path).size == (8 * 19, 8 * 19)  # of 360 images


@pytest.mark.parametrize(
    ("size", "side"), [((1, 8, 8), 8), ((3, 5, 9), 9), ((4, 9, 5), 9), ((2, 6, 6), 6), ((3, 200, 100), 64)]
)
def test_thumbnails_stand_in_a_square(size: tuple[int, int, int], side: int) -> None:
    images = torch.randint(256, (7, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture, found = figures.sprite(images)
    assert (found, picture.shape, picture.dtype) == (side, (3 * side, 3 * side, 3), np.uint8)
    for place in range(9):
        tile = torch.from_numpy(picture[place // 3 * side :, place % 3 * side :][:side, :side])
        if place >= 7:
            assert not tile.any()
            continue
        image = images[place] if size[0] in (1, 3) else images[place, :1]
        if max(size) > 64:
            image = torch.from_numpy(np.asarray(nn.functional.adaptive_avg_pool2d(image.float(), (64, 32)).round()))
        height, width = image.shape[1:]
        assert torch.equal(tile[:height, :width].permute(2, 0, 1), image.expand(3, -1, -1).to(torch.uint8))
        assert not tile[height:].any()
        assert not tile[:, width:].any()


def test_names_keep_to_their_cell(tmp_path: Path) -> None:
    columns = {"class": ["a\tb", "c\nd"], "predicted": ["e", "f"]}
    board.write_projection(tmp_path, torch.zeros(2, 3), columns, torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    assert (tmp_path / "embedding/labels.tsv").read_text() == "class\tpredicted\na b\te\nc d\tf\n"


def test_a_model_without_linear_layers_has_no_embedding_and_all_else(tmp_path: Path) -> None:
    layers = "[{conv: {out: classes, kernel: 3}}, {globalpool: avg}]"
    every = f"tensorboard={switched(**dict.fromkeys(SWITCHES, True))}"
    shown = Shown(tmp_path, plain(DIGITS, f"model={{name: cnn, layers: {layers}}}", every))
    shown.after_epoch()
    events = shown.at_the_end()
    assert shown.notes == ["TensorBoard shows no embedding: the model has no linear layer, or images have no class"]
    assert "_hparams_/session_end_info" in events.summary_metadata
    assert "weights/0_conv.weight" in events.Tags()["histograms"]
    assert not [tag for tag in events.Tags()["histograms"] if tag.startswith("gradients")]  # no step was taken


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16"])
def test_what_is_shown_of_torchvision_s_models(arch: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(arch, weights=None, num_classes=3, **({"image_size": 32} if "vit" in arch else {}))
    _, filters = board.first_filters(model, (3, 32, 32))
    assert figures.filter_picture(filters).shape[0] == 3


def four_channels(setup: Any) -> Any:
    data = setup.data
    for name in ("train", "test"):
        split = getattr(data, name)
        wide = split.images.repeat(1, 4, 1, 2)  # [N, 4, 8, 16]
        object.__setattr__(data, name, Split(wide, split.labels))
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 6 * 14, 10))
    object.__setattr__(setup, "model", model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return setup


def test_images_of_four_channels_that_are_not_square(tmp_path: Path) -> None:
    every = f"tensorboard={switched(**dict.fromkeys(SWITCHES, True))}"
    shown = Shown(tmp_path, plain(DIGITS, every), four_channels)
    shown.after_epoch()
    events = shown.at_the_end()
    assert shown.notes == []
    assert set(events.Tags()["images"]) == {
        "images/train as the model sees them",
        "filters/0",
        "test/confusion matrix",
        "test/worst mistakes",
    }
    assert events.Histograms("gradients/0.weight")[0].histogram_value.sum == 5 * 4 * 3 * 3


def test_bfloat16_is_shown(tmp_path: Path) -> None:
    shown = Shown(tmp_path, plain(DIGITS, f"tensorboard={switched(weight_histograms=True)}"))
    shown.run.setup.model.to(torch.bfloat16)
    weight = shown.run.setup.model[1].weight
    with torch.no_grad():
        weight.mul_(1e-9)  # too small for float16, which NumPy has in place of bfloat16
    shown.board.has_examples = True
    shown.run.progress.epoch = 3
    shown.board.epoch(None, lambda: torch.zeros(0))
    (event,) = shown.read().Histograms("weights/1.weight")
    assert event.histogram_value.sum == pytest.approx(weight.double().sum().item(), abs=0)


@pytest.mark.parametrize(
    ("switch", "breaks"),
    [
        ("weight_histograms", "torch.utils.tensorboard.SummaryWriter.add_histogram"),
        ("filters", "dltrain.board.filter_picture"),
        ("pr_curves", "torch.utils.tensorboard.SummaryWriter.add_pr_curve"),
        ("embedding", "dltrain.board.sprite"),
    ],
)
def test_what_fails_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str, breaks: str
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(breaks, fail)
    shown = Shown(tmp_path, plain(DIGITS, f"tensorboard={switched(**{switch: True})}"))
    shown.after_epoch()
    shown.at_the_end()
    shown.board.close()
    assert len(shown.notes) == 1
    assert "No space left" in shown.notes[0]
