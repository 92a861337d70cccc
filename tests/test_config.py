"""The config language: what is right is read, what is wrong is said in one line that names it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from conftest import Run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from dltrain import config, registry, schema, shipped, yamlfile
from dltrain.config import Config
from dltrain.errors import ConfigError
from dltrain.registry import Entry, suggest
from dltrain.yamlfile import Document

START = "name: x\ndata: digits\nmodel: perceptron\noptim: {name: sgd, lr: 0.1}\n"  # what a test adds begins in line 5


def check(text: str, *overrides: str) -> Config:
    return config.check(yamlfile.parse(text, "f.yaml"), overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def instead(**sections: str | None) -> str:
    """START with other sections; None leaves one out."""
    whole = {"name": "x", "data": "digits", "model": "perceptron", "optim": "{name: sgd, lr: 0.1}", **sections}
    return "".join(f"{key}: {value}\n" for key, value in whole.items() if value is not None)


def test_a_config_with_every_section() -> None:
    found = check("""
name: try-1
seed: 3
data: {name: mnist, val: 0.1, classes: [3, seven], limit: 100, augment: [flip, {translate: 4}], root: /data}
model: {name: mlp, hidden: [8, 4], activation: {leaky_relu: 0.2}, output: sigmoid}
loss: bce
descent: {batch_size: 32, micro_batch_size: 8}
optim: {name: sgd, lr: 1e-3}
schedule: {name: cosine, warmup_epochs: 1}
train: {epochs: 5, device: 'cuda:1', patience_epochs: 2, clip_norm: 1}
""")
    assert (found.name, found.seed, found.chosen_by) == ("try-1", 3, "val_accuracy")
    assert (found.data.source.name, found.data.val, found.data.classes) == ("mnist", 0.1, [3, "seven"])
    assert [(each.name, dict(each.args)) for each in found.data.augment] == [
        ("flip", {"probability": 0.5}),
        ("translate", {"pixels": 4, "pad": "zero"}),
    ]
    assert found.model.source.args["hidden"] == [8, 4]
    assert found.model.source.args["activation"].args == {"slope": 0.2}
    assert found.optim.source.args == {"lr": 0.001, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    assert found.schedule.args == {"warmup_epochs": 1.0, "final": 0.0}
    assert found.train.device == "cuda:1"


def test_what_is_left_out_has_its_default() -> None:
    found = check(START)
    assert (found.seed, found.loss.name, found.schedule.name) == (0, "cross_entropy", "constant")
    assert (found.data.val, found.data.augment, found.train.epochs, found.chosen_by) == (0, [], 10, "last")


def test_a_config_does_not_change() -> None:
    found = check(START)
    for part, key in ((found, "seed"), (found.train, "epochs"), (found.data, "val")):
        with pytest.raises(ValidationError):
            setattr(part, key, 1)


def test_the_name_is_the_files_where_it_is_not_given(tmp_path: Path) -> None:
    text = instead(name=None)
    for stem, name in {
        "my run (2)": "my_run__2_",
        ".hidden": "_hidden",
        "Übung-1.a": "Übung-1.a",
        "-" + "a" * 150: "_" + "a" * 99,
        "²": "_",
    }.items():
        path = tmp_path / f"{stem}.yaml"
        path.write_text(text)
        assert config.load(path).name == name
    path.write_text(f"name: 'given'\n{text}")
    assert config.load(path).name == "given"
    assert mistakes(text) == ["f.yaml:1: name: missing"]


@pytest.mark.parametrize(
    ("variant", "images", "sizes"),
    [
        ("{variant: batch}", 3500, (3500, 1000)),
        ("{variant: batch}", 500, (500, 500)),
        ("{variant: batch, micro_batch_size: 100}", 3500, (3500, 100)),
        ("{variant: stochastic}", 3500, (1, 1)),
        ("{}", 3500, (128, 128)),
        ("{batch_size: 500}", 3500, (500, 500)),
        ("{batch_size: 500, micro_batch_size: 50}", 3500, (500, 50)),
    ],
)
def test_the_sizes_of_steps(variant: str, images: int, sizes: tuple[int, int]) -> None:
    assert check(instead(descent=variant)).descent.sizes(images) == sizes


LAYERS = "\n  name: cnn\n  layers:\n"  # as the model of `instead`, its first layer stands in line 6
SEVERAL = "its settings stand below its name, indented further, or as name: {key: value}"
NAME = "letters, digits, '_', '.' and '-', the first a letter, digit or '_', at most 100"
THERE = {kind: suggest("", registry.names(kind)).removeprefix("; ") for kind in registry.KINDS}
THERE["augmentation"] = suggest("", registry.names("augmentation", "mixing")).removeprefix("; ")
EACH_MISTAKE = [
    # a component's name
    (instead(optim="{name: sgdd, lr: 1}"), "4: optim.name: unknown optim 'sgdd'; did you mean 'sgd'?"),
    (instead(optim="{name: SGD, lr: 1}"), "4: optim.name: unknown optim 'SGD'; did you mean 'sgd'?"),
    (instead(data="CIFAR-10"), "2: data: unknown data 'CIFAR-10'; did you mean 'cifar10'?"),
    (instead(loss="zzz"), f"5: loss: unknown loss 'zzz'; {THERE['loss']}"),
    (instead(optim="{nam: sgd, lr: 1}"), "4: optim.name: missing; is nam meant to be it?"),
    (instead(schedule="{nmae: cosine, final: 0.1}"), "5: schedule.name: missing; is nmae meant to be it?"),
    (instead(schedule="{final: 0.1}"), "5: schedule.final: unknown key; there is warmup_epochs"),
    (instead(model="{hidden: [3]}"), f"3: model.name: missing; {THERE['model']}"),
    (
        instead(model="{name: 3}"),
        f"3: model.name: expected the name of one model, got 3; {THERE['model']}",
    ),
    (
        instead(loss="[mse]"),
        f"5: loss: expected a name, or settings with `name:`, got a list of 1; {THERE['loss']}",
    ),
    (
        instead(loss=""),
        f"5: loss: expected a name, or settings with `name:`, got nothing; {THERE['loss']}",
    ),
    # keys
    (instead(optimizer="{name: sgd, lr: 1}", optim=None), "4: optimizer: unknown key; did you mean 'optim'?"),
    (instead(modle="perceptron", model=None), "4: modle: unknown key; did you mean 'model'?"),
    (instead(losss="mse"), "5: losss: unknown key; did you mean 'loss'?"),
    (instead(optim="{name: sgd, lr: 1, momentun: 0.9}"), "4: optim.momentun: unknown key; did you mean 'momentum'?"),
    (instead(optim="{name: sgd, rl: 0.1}"), "4: optim.rl: unknown key; did you mean 'lr'?"),
    (
        instead(optim="{name: sgd, learning_rate: 0.1}"),
        "4: optim.learning_rate: unknown key; "
        "there is decay_norms_and_biases, groups, lookahead, lr, momentum, nesterov, sam_rho, weight_decay",
    ),
    (instead(model="{name: mlp, hiden: [3]}"), "3: model.hiden: unknown key; did you mean 'hidden'?"),
    (
        instead(model="{name: mlp, hidden: [3], outptu: softmax}"),
        "3: model.outptu: unknown key; did you mean 'output'?",
    ),
    (instead(data="{name: cifar100, lables: fine}"), "2: data.lables: unknown key; did you mean 'labels'?"),
    (instead(data="{name: cifar100, vall: 1}"), "2: data.vall: unknown key; did you mean 'val'?"),
    (
        instead(data="{name: digits, source: 1}"),
        "2: data.source: unknown key; there is augment, balance, classes, limit, resident, root, val, verify",
    ),
    (instead(schedule="{name: cosine, warmup: 1}"), "5: schedule.warmup: unknown key; did you mean 'warmup_epochs'?"),
    (instead(descent="{batchsize: 32}"), "5: descent.batchsize: unknown key; did you mean 'batch_size'?"),
    (instead(train="{epoch: 3}"), "5: train.epoch: unknown key; did you mean 'epochs'?"),
    (instead(loss="{name: mse, reduction: sum}"), "5: loss.reduction: unknown key; there are no settings here"),
    (instead(loss="{name: mse, '{0}': 1}"), "5: loss.{0}: unknown key; there are no settings here"),
    (instead(loss="'{0.x}{'"), "5: loss: unknown loss '{0.x}{'; " + THERE["loss"]),
    (instead(optim="sgd"), "4: optim.lr: missing"),
    (instead(schedule="{name: step}"), "5: schedule.every_epochs: missing"),
    (instead(model=None), "1: model: missing"),
    # types
    (instead(optim="{name: sgd, lr: '0.1'}"), "4: optim.lr: expected a number, got '0.1'"),
    (instead(optim="{name: sgd, lr: 012}"), "4: optim.lr: expected a number, got '012'"),
    (instead(optim="{name: sgd, lr: 1:30}"), "4: optim.lr: expected a number, got '1:30'"),
    (instead(optim="{name: sgd, lr: null}"), "4: optim.lr: expected a number, got nothing"),
    (instead(optim="{name: sgd, lr: {a: 1}}"), "4: optim.lr: expected a number, got a mapping"),
    (instead(optim="{name: sgd, lr: 1, momentum: true}"), "4: optim.momentum: expected a number, got true"),
    (instead(optim="{name: sgd, lr: 1, nesterov: no}"), "4: optim.nesterov: expected true or false, got 'no'"),
    (instead(optim="{name: sgd, lr: 1, nesterov: 1}"), "4: optim.nesterov: expected true or false, got 1"),
    (instead(train="{epochs: 1.5}"), "5: train.epochs: expected a whole number, got 1.5"),
    (instead(train="{epochs: 1e3}"), "5: train.epochs: expected a whole number, got 1000.0"),
    (instead(train="[]"), "5: train: expected settings (key: value), got a list of 0"),
    (instead(descent="batch"), "5: descent: expected settings (key: value), got 'batch'"),
    (instead(train=""), "5: train: expected settings (key: value), got nothing"),
    (instead(model="{name: mlp, hidden: 128}"), "3: model.hidden: expected a list, got 128"),
    (instead(model="{name: mlp, hidden: [8, a]}"), "3: model.hidden.1: expected a whole number, got 'a'"),
    (instead(data="{name: digits, root: 3}"), "2: data.root: expected text, got 3; as text, put it in quotes"),
    (instead(name="2024"), "1: name: expected text, got 2024; as text, put it in quotes"),
    # values
    (instead(optim="{name: sgd, lr: 0}"), "4: optim.lr: expected more than 0, got 0"),
    (instead(optim="{name: sgd, lr: .inf}"), "4: optim.lr: expected a finite number, got .inf"),
    (instead(optim="{name: sgd, lr: -.inf}"), "4: optim.lr: expected a finite number, got -.inf"),
    (instead(optim="{name: sgd, lr: .nan}"), "4: optim.lr: expected a finite number, got .nan"),
    (instead(optim="{name: sgd, lr: 1, momentum: 1}"), "4: optim.momentum: expected less than 1, got 1"),
    (instead(optim="{name: sgd, lr: 1, momentum: -1}"), "4: optim.momentum: expected at least 0, got -1"),
    (instead(data="{name: digits, augment: [{flip: 2}]}"), "2: data.augment.0.flip: expected at most 1, got 2"),
    (instead(data="{name: digits, classes: [3]}"), "2: data.classes: expected a list of at least 2, got a list of 1"),
    (instead(name="a/b"), f"1: name: expected {NAME}, got 'a/b'"),
    (instead(name=".."), f"1: name: expected {NAME}, got '..'"),
    (instead(name="'a b'"), f"1: name: expected {NAME}, got 'a b'"),
    (instead(name='"a\\n"'), f"1: name: expected {NAME}, got 'a\\n'"),
    (instead(seed="-1"), "5: seed: expected at least 0, got -1"),
    (
        instead(train="{device: gpu}"),
        "5: train.device: expected auto, cpu, mps, cuda or cuda:N, got 'gpu'; did you mean 'cpu'?",
    ),
    (instead(train="{precision: 32}"), "5: train.precision: expected auto, fp32 or bf16, got 32"),
    (
        instead(descent="{variant: mini_batch}"),
        "5: descent.variant: expected batch, stochastic or mini-batch, got 'mini_batch'; did you mean 'mini-batch'?",
    ),
    # several types at once: one line
    (instead(data="{name: digits, val: 10%}"), "2: data.val: expected a number, got '10%'"),
    (
        instead(data="{name: digits, val: 1.5}"),
        "2: data.val: expected a whole number or a number of less than 1, got 1.5",
    ),
    (
        instead(data="{name: digits, val: -1}"),
        "2: data.val: expected a whole number of at least 0 or a number of more than 0, got -1",
    ),
    (
        instead(data="{name: digits, classes: [1, 7.5]}"),
        "2: data.classes.1: expected a whole number or text, got 7.5; as text, put it in quotes",
    ),
    # lists of components
    (instead(data="{name: digits, augment: flip}"), "2: data.augment: expected a list, got 'flip'"),
    (instead(data="{name: digits, augment: {flip: 1}}"), "2: data.augment: expected a list, got a mapping"),
    (
        instead(data="{name: digits, augment: [flp]}"),
        "2: data.augment.0: unknown augmentation 'flp'; did you mean 'flip'?",
    ),
    (instead(data="{name: digits, augment: [translate]}"), "2: data.augment.0.translate.pixels: missing"),
    (
        instead(data="{name: digits, augment: [3]}"),
        "2: data.augment.0: expected one augmentation: its name, or name: settings, got 3; " + THERE["augmentation"],
    ),
    (
        instead(data="{name: digits, augment: [{translate: 4, pad: zero}]}"),
        f"2: data.augment.0: expected one augmentation, got the keys translate, pad; {SEVERAL}",
    ),
    (
        instead(model="{name: mlp, hidden: [3], activation: {name: relu}}"),
        "3: model.activation: unknown activation 'name'; " + THERE["activation"],
    ),
    (instead(model=LAYERS + "    - conv"), "6: model.layers.0.conv.out: missing"),
    (instead(model=LAYERS + "    - relu: 3"), "6: model.layers.0.relu: takes no settings, got 3"),
    (instead(model=LAYERS + "    - relu: {a: 3}"), "6: model.layers.0.relu.a: unknown key; there are no settings here"),
    (
        instead(model=LAYERS + "    - linear: clases"),
        "6: model.layers.0.linear: expected a whole number or classes, got 'clases'; did you mean 'classes'?",
    ),
    (
        instead(model=LAYERS + "    - relu\n    - conv:\n      out: 3\n      kernel: 3"),
        f"7: model.layers.1: expected one layer, got the keys conv, out, kernel; {SEVERAL}",
    ),
    (
        instead(model=LAYERS + "    - relu\n    - conv:\n        out: 3\n        kernal: 3"),
        "9: model.layers.1.conv.kernal: unknown key; did you mean 'kernel'?",
    ),
    (
        instead(
            model=LAYERS + "    - repeat:\n        times: 2\n        layers:\n          - relu\n          - convv: 4"
        ),
        "10: model.layers.0.repeat.layers.1: unknown layer 'convv'; did you mean 'conv'?",
    ),
    (
        instead(model=LAYERS + "    - residual:\n      - repeat: {times: 2, layers: [{conv: {out: 3, stride: 0}}]}"),
        "7: model.layers.0.residual.0.repeat.layers.0.conv.stride: expected more than 0, got 0",
    ),
    (instead(model="{name: cnn, layers: []}"), "3: model.layers: expected a list of at least 1, got a list of 0"),
    # settings that do not go together
    (
        instead(descent="{variant: batch, batch_size: 3}"),
        "5: descent.batch_size: belongs to variant mini-batch (batch takes all images, stochastic one): "
        "leave it out, or null",
    ),
    (
        instead(descent="{batch_size: 3, micro_batch_size: 4}"),
        "5: descent.micro_batch_size: expected at most the 3 of a step, got 4",
    ),
    (
        instead(descent="{variant: stochastic, micro_batch_size: 2}"),
        "5: descent.micro_batch_size: expected at most the 1 of a step, got 2",
    ),
    (
        instead(train="{patience_epochs: 3}"),
        "5: train.patience_epochs: needs images to choose by: set data.val, e.g. to 0.1",
    ),
    (
        instead(train="{patience_epochs: 3, choose_by: val_loss}"),
        "5: train.choose_by: needs images to choose by: set data.val, e.g. to 0.1",
    ),
    (
        instead(data="{name: digits, val: 5}", train="{patience_epochs: 3, choose_by: last}"),
        "5: train.patience_epochs: nothing is better than the last epoch: "
        "set train.choose_by to val_accuracy or val_loss",
    ),
    (
        instead(schedule="\n  name: cosine\n  warmup_epochs: 5", train="{epochs: 5}"),
        "7: schedule.warmup_epochs: 5 leaves nothing of the run's 5 epochs: lower it or raise train.epochs",
    ),
    # no config at all
    ("- a\n", "1: a config is a mapping (key: value), with data, model and optim"),
    ("# a comment\n\ntext\n", "3: a config is a mapping (key: value), with data, model and optim"),
]


@pytest.mark.parametrize(("text", "line"), EACH_MISTAKE, ids=[line.partition(",")[0] for _, line in EACH_MISTAKE])
def test_a_mistake_is_one_line(text: str, line: str) -> None:
    assert mistakes(text) == [f"f.yaml:{line}"]


def test_each_mistake_has_its_line_in_the_files_order() -> None:
    text = instead(
        train="\n  epoch: 3\n  device: x1\n  clip_norm: -1",
        seed="-1",
        data="digit",
        loss="{name: cross_entropy, label_smooting: 0.1, class_weights: 3}",
    )
    assert mistakes(text) == [
        "f.yaml:2: data: unknown data 'digit'; did you mean 'digits'?",
        "f.yaml:6: train.epoch: unknown key; did you mean 'epochs'?",
        "f.yaml:7: train.device: expected auto, cpu, mps, cuda or cuda:N, got 'x1'",
        "f.yaml:8: train.clip_norm: expected more than 0, got -1",
        "f.yaml:9: seed: expected at least 0, got -1",
        "f.yaml: and 2 more",
    ]


def test_a_misspelt_key_is_not_missing_but_others_are() -> None:
    assert mistakes(instead(modle="perceptron", model=None, data=None)) == [
        "f.yaml:1: data: missing",
        "f.yaml:3: modle: unknown key; did you mean 'model'?",
    ]
    assert mistakes(instead(optim="{name: sgd, momentun: 0.9}")) == [
        "f.yaml:4: optim.momentun: unknown key; did you mean 'momentum'?",
        "f.yaml:4: optim.lr: missing",
    ]


Even = Annotated[int, Field(multiple_of=2)]


def test_a_component_of_ones_own_may_check_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of pydantic's for what dltrain has none for, still in one line and with the place."""
    monkeypatch.setattr(registry, "_entries", {kind: dict(each) for kind, each in registry._entries.items()})

    @registry.register("loss")
    def tiled(outputs: object, targets: object, *, size: Even = 2, power: Literal[1, 2] = 1) -> None:
        """Anything."""

    assert mistakes(instead(loss="{name: tiled, size: 3, power: 4}")) == [
        "f.yaml:5: loss.size: expected a multiple of 2, got 3",
        "f.yaml:5: loss.power: expected 1 or 2, got 4",
    ]


@pytest.mark.parametrize(
    ("before", "overrides", "after"),
    [
        ("optim: {name: sgd, lr: 1}", ["optim.lr=0.05"], {"optim": {"name": "sgd", "lr": 0.05}}),
        ("optim: {name: sgd, lr: 1}", [" optim.lr = 5e-2 "], {"optim": {"name": "sgd", "lr": 0.05}}),
        ("optim: sgd", ["optim.lr=1"], {"optim": {"name": "sgd", "lr": 1}}),
        ("a: 1", ["train.epochs=3", "train.device=cpu"], {"a": 1, "train": {"epochs": 3, "device": "cpu"}}),
        ("train:", ["train.epochs=3"], {"train": {"epochs": 3}}),
        ("a: 1", ["optim={name: sgd, lr: 0.1}"], {"a": 1, "optim": {"name": "sgd", "lr": 0.1}}),
        ("a: 1", ["a="], {"a": None}),
        ("a: 1", ["a=null"], {"a": None}),
        ("a: 1", ["a='x=y'"], {"a": "x=y"}),
        ("a: 1", ["a=b=c"], {"a": "b=c"}),
        ("a: [1, 2]", ["a.1=3"], {"a": [1, 3]}),
        ("a: 1", ["a=[1, 2]", "a.0=5"], {"a": [5, 2]}),
        ("m: {layers: [conv]}", ["m.layers.0.conv.out=3"], {"m": {"layers": [{"conv": {"out": 3}}]}}),
        ("m: {layers: [relu]}", ["m.layers.0=tanh"], {"m": {"layers": ["tanh"]}}),
        ("m: {layers: [{repeat: [relu]}]}", ["m.layers.0.repeat.0=tanh"], {"m": {"layers": [{"repeat": ["tanh"]}]}}),
    ],
)
def test_an_override_replaces_one_value(before: str, overrides: list[str], after: Any) -> None:
    data = yamlfile.parse(before, "f").data
    for text in overrides:
        config.override(data, text)
    assert data == after


IN_LIST = "model.hidden is a list of 2; expected 0..1 after it, got"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.lr"], "expected key=value, for example optim.lr=0.05"),
        (["=3"], "expected key=value, for example optim.lr=0.05"),
        ([".=3"], "expected key=value, for example optim.lr=0.05"),
        (["optim.lr=-1"], "optim.lr: expected more than 0, got -1"),
        (["optim.lr="], "optim.lr: expected a number, got nothing"),
        (["optim.lrr=1"], "optim.lrr: unknown key; did you mean 'lr'?"),
        (["oprim.lr=1"], "oprim: unknown key; did you mean 'optim'?"),
        (["loss=msee"], "loss: unknown loss 'msee'; did you mean 'mse'?"),
        (["optim=sgd"], "optim.lr: missing"),
        (["optim.lr=1", "optim=sgd"], "optim.lr: missing"),
        (["optim=adam", "optim.lr=0"], "optim.lr: expected more than 0, got 0"),
        (["train.clip_norm=x"], "train.clip_norm: expected a number, got 'x'"),
        (
            ["data.x=2", "data={name: digits}", "train.patience_epochs=2"],
            "train.patience_epochs: needs images to choose by: set data.val, e.g. to 0.1",
        ),
        (
            ["schedule=cosine", "schedule.warmup_epochs=50"],
            "schedule.warmup_epochs: 50 leaves nothing of the run's 10 epochs: lower it or raise train.epochs",
        ),
        (["seed.x=1"], "seed is 3 and has nothing below it; set it whole"),
        (["model.output.x=1"], "model.output is 'softmax' and has nothing below it; set it whole"),
        (["model.hidden.0.x=1"], "model.hidden.0 is 8 and has nothing below it; set it whole"),
        (["model.hidden.2=1"], f"{IN_LIST} '2'"),
        (["model.hidden.-1=1"], f"{IN_LIST} '-1'"),
        (["model.hidden.²=1"], f"{IN_LIST} '²'"),
        (["data.augment=[]", "data.augment.0=flip"], "data.augment is a list of 0; set it whole"),
        (["seed=[1"], "not YAML: did not find expected ',' or ']', while parsing a flow sequence from line 1 on"),
        (
            ["seed=!!python/name:os.system x"],
            "tags such as 'tag:yaml.org,2002:python/name:os.system' are not part of the config language",
        ),
    ],
)
def test_a_wrong_override_is_named_and_not_the_file(overrides: list[str], said: str) -> None:
    text = instead(model="{name: mlp, hidden: [8, 4], output: softmax}", seed="3")
    assert mistakes(text, *overrides) == [f"--set {overrides[-1]}: {said}"]


def test_the_override_that_put_a_value_there_is_named() -> None:
    assert mistakes(START, "optim=adm", "optim.lr=1", "seed=1") == [
        "--set optim=adm: optim.name: unknown optim 'adm'; did you mean 'adam'?"
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("", "--set '': expected key=value"),
        ("seed=\x1b[31m", "--set 'seed=\\x1b[31m': character U+001B has no place in a config"),
        ("seed=\n- 1\n: 2", "--set 'seed=\\n- 1\\n: 2': not YAML: "),
        (
            "seed=" + "9" * 5000,
            f"--set seed={'9' * 74}…: '99999999999999999999…' is a whole number of more than 18 digits",
        ),
        ("model.hidden." + "9" * 5000 + "=1", f"--set model.hidden.{'9' * 66}…: {IN_LIST} '{'9' * 58}…"),
    ],
)
def test_a_hostile_override_is_one_short_line(override: str, said: str) -> None:
    (line,) = mistakes(instead(model="{name: mlp, hidden: [8, 4]}"), override)
    assert line.startswith(said)
    assert line.isprintable()
    assert len(line) < 250


def test_a_mistake_beside_an_override_is_the_files() -> None:
    assert mistakes(instead(optim="\n  name: sgd\n  lr: x"), "optim.momentum=0.9") == [
        "f.yaml:6: optim.lr: expected a number, got 'x'"
    ]


def test_overrides_leave_the_document_as_it_is() -> None:
    document = yamlfile.parse(START, "f.yaml")
    assert config.check(document, ["optim.lr=5"]).optim.source.args["lr"] == 5
    assert config.check(document).optim.source.args["lr"] == 0.1


CONV = {
    "out": 3, "kernel": [5, 3], "stride": 2, "padding": "same", "padding_mode": "reflect", "dilation": 3, "groups": 1,
    "connections": None, "bias": False, "init": {"constant": {"value": 0.625}},
}  # fmt: skip
WRITTEN = {"activation": {"leaky_relu": {"slope": 0.25}}, "layer": {"conv": CONV}, "init": {"constant": {"value": 0.5}}}
# what a schema cannot say of the values
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("model", "cnn"): {"layers": [{"conv": CONV}], "init": {"constant": {"value": 0.5}}},
    ("schedule", "knots"): {"knots": [[0.0, 0.2], [3.0, 1.0], [4.5, 0.625]]},
    ("schedule", "multistep"): {"milestones_epochs": [2.0, 3.5], "factor": 0.625, "warmup_epochs": 0.625},
}


def other(described: dict[str, Any]) -> Any:
    """A value that a JSON schema allows and that is not its default, written in full."""
    if "$ref" in described:
        return WRITTEN[described["$ref"].removeprefix("#/$defs/").removesuffix("_item")]
    if "anyOf" in described or "enum" in described:
        values = reversed(described["enum"]) if "enum" in described else map(other, described["anyOf"])
        return next(value for value in values if value != described.get("default"))
    match described["type"]:
        case "boolean":
            return not described["default"]
        case "array":
            return [other(described["items"])] * 2
        case "string":  # text that YAML 1.2 takes for a number and YAML 1.1 does not
            return "1e3"
        case kind:
            values = [7, 3, 40] if kind == "integer" else [0.625, 0.375, 1.625, 40.5]
            return next(value for value in values if value != described.get("default") and allowed(value, described))


def allowed(value: float, described: dict[str, Any]) -> bool:
    low, high = described.get("minimum", -math.inf), described.get("maximum", math.inf)
    return low <= value <= high and described.get("exclusiveMinimum", -math.inf) < value < described.get(
        "exclusiveMaximum", math.inf
    )


def whole_config(entry: Entry) -> tuple[dict[str, Any], list[str | int], Any]:
    """A config that uses the component with every argument given, the place of it in there, and what stands there."""
    described = schema.section(entry.arguments)["properties"]
    arguments = EXAMPLES.get((entry.kind, entry.name)) or {name: other(each) for name, each in described.items()}
    whole: dict[str, Any] = {"name": "1e3", "data": {"name": "digits"}, "model": "perceptron", "optim": "adam"}
    item = {entry.name: arguments} if arguments else entry.name
    named = {"name": entry.name, **arguments}
    if entry.facts.get("closure"):
        whole["descent"] = {"variant": "batch"}
    if entry.kind == "loss":
        whole["task"] = entry.facts.get("tasks", ("classification",))[0]
    match entry.kind:
        case "augmentation" | "mixing":
            whole["data"]["augment"] = [item, "flip"]
            return whole, ["data", "augment", 0], item
        case "layer" | "activation":
            whole["model"] = {"name": "cnn", "layers": [item, "relu"]}
            return whole, ["model", "layers", 0], item
        case "init" | "data_init":
            whole["model"] = {"name": "cnn", "layers": [{"conv": {**CONV, "init": item}}]}
            return whole, ["model", "layers", 0, "conv", "init"], item
        case "task":
            losses = [each.name for each in registry.entries("loss") if entry.name in each.facts.get("tasks", ())]
            whole["loss"] = losses[0]
        case "feedback":
            whole["schedule"] = named
            return whole, ["schedule"], named
        case "average":
            whole["train"] = {"average": named}
            return whole, ["train", "average"], named
    whole[entry.kind] = named
    return whole, [entry.kind], named


EVERY = [entry for kind in registry.KINDS for entry in registry.entries(kind)]


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_a_config_is_the_same_after_writing_and_reading(entry: Entry, tmp_path: Path) -> None:
    whole, place, component = whole_config(entry)
    before = config.from_plain(whole, "test")
    plain = before.plain()
    node: Any = plain
    for step in place:
        node = node[step]
    assert node == component or component.items() <= node.items()  # data and model have shared settings too
    assert config.from_plain(plain, "test") == before
    assert config.from_plain(json.loads(json.dumps(plain)), "test") == before
    path = tmp_path / "config.yaml"
    path.write_text(before.yaml())
    assert config.load(path) == before
    assert config.load(path).plain() == plain


def test_every_shared_setting_survives_too(tmp_path: Path) -> None:
    data = {
        "root": "1e3",
        "verify": False,
        "balance": True,
        "resident": "auto",
        "val": 0.5,
        "classes": ["1e3", 4],
        "limit": 9,
        "augment": ["flip"],
    }
    train = {key: other(each) for key, each in schema.section(config.Train)["properties"].items() if key != "average"}
    train |= {"choose_by": "val_loss", "average": {"name": "ema", "decay": 0.5, "every_steps": 3}}
    optim = {
        "groups": [{"match": "*.bias", "lr": 0.5}, {"ndim": 2, "name": "sgd", "lr": 1, "schedule": "cosine"}],
        "decay_norms_and_biases": False,
        "sam_rho": 0.25,
        "lookahead": {"every_steps": 3, "share": 0.25},
    }
    whole = {
        "name": "a.b",
        "seed": 5,
        "data": {"name": "digits", **data},
        "model": {"name": "perceptron", "output": "sigmoid", "frozen": ["1e3"]},
        "optim": {"name": "adam", **optim},
        "descent": {"variant": "mini-batch", "batch_size": 5, "micro_batch_size": 2},
        "train": train,
    }
    before = config.from_plain(whole, "test")
    assert before.plain()["train"] == train
    assert before.plain()["descent"] == whole["descent"]
    assert optim.items() <= before.plain()["optim"].items()
    assert before.plain()["data"] == {"name": "digits", **data, "augment": [{"flip": {"probability": 0.5}}]}
    path = tmp_path / "config.yaml"
    path.write_text(before.yaml())
    assert config.load(path) == before


def test_short_and_long_forms_of_nested_layers_are_the_same_config(tmp_path: Path) -> None:
    short = """
    - conv: 8
    - relu
    - maxpool:
    - residual: [relu, {repeat: {times: 2, layers: [{dropout: 0.25}, leaky_relu]}}]
    - linear: classes
"""
    long = """
    - conv: {out: 8, kernel: 3, stride: 1, padding: valid, dilation: 1, groups: 1, bias: true}
    - relu: {}
    - maxpool: {size: 2, stride: null, padding: 0}
    - residual:
        shortcut: identity
        layers:
          - relu:
          - repeat:
              layers:
                - dropout: {probability: 0.25}
                - leaky_relu: {slope: 0.01}
              times: 2
    - linear: {out: classes, bias: true}
"""
    found = check(instead(model="\n  name: cnn\n  layers:" + short))
    assert found == check(instead(model="\n  name: cnn\n  layers:" + long))
    assert check(found.yaml()) == found
    assert config.from_plain(found.plain(), "test") == found
    inner = found.model.source.args["layers"][3].args["layers"][1]
    assert (inner.name, [each.name for each in inner.args["layers"]]) == ("repeat", ["dropout", "leaky_relu"])


def test_what_nests_too_deep_for_python_is_refused() -> None:
    layers: Any = ["relu"]
    for _ in range(2000):
        layers = [{"repeat": {"times": 1, "layers": layers}}]
    plain = check(START).plain() | {"model": {"name": "cnn", "layers": layers}}
    with pytest.raises(ConfigError, match="meta: nested too deep"):
        config.from_plain(plain, "meta")


def test_mistakes_in_what_has_no_lines_name_the_source() -> None:
    with pytest.raises(ConfigError) as caught:
        config.check(Document("run/checkpoint", {**check(START).plain(), "seed": -1}))
    assert str(caught.value) == "run/checkpoint: seed: expected at least 0, got -1"


SYNTAX = [
    *"{}[]:,-&*!|>'\"%@#?\n\t",
    ": ",
    "- ",
    "\n  ",
    "\n    ",
    "\n- ",
    "a",
    "&a ",
    "*a",
    "!!str ",
    "---\n",
    "null",
    "1e-3",
]
WORDS = [
    "name",
    "data",
    "model",
    "optim",
    "train",
    "digits",
    "cnn",
    "layers",
    "conv",
    "relu",
    "{name: sgd, lr: 1}",
    "{0}",
]
YAMLISH = st.lists(st.sampled_from([*SYNTAX, *WORDS]), max_size=40).map("".join)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(registry.names(*registry.KINDS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "layers", "lr", "{0}", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from([*Config.model_fields, "{x}", "lr", "a\nb"])
CONFIGS = st.dictionaries(KEYS, VALUES, max_size=6).map(yaml.safe_dump)


@settings(derandomize=True, max_examples=800, deadline=None)
@given(st.one_of(st.text(), YAMLISH, CONFIGS, st.tuples(st.just(START), YAMLISH).map("".join)))
@example(START)
@example(instead(model="'{'", loss="'{0}'", optim="{name: '{text}', '{x}': 1}"))
def test_whatever_the_text_only_a_config_error_comes_out(text: str) -> None:
    try:
        found = check(text)
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = ["none"]
        assert check(found.yaml()) == found
    assert 1 <= len(lines) <= config.MAX_ERRORS + 1
    assert all(line.isprintable() for line in lines)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from([*"=.{}[]:, 012", "optim", "lr", "model", "hidden", "train", "²", "\n"]), max_size=9).map(
        "".join
    )
)
def test_whatever_the_override_only_a_config_error_comes_out(text: str) -> None:
    lines = []
    try:
        check(instead(model="{name: mlp, hidden: [8, 4]}"), text)
    except ConfigError as error:
        lines = str(error).splitlines()
    assert all(line.isprintable() for line in lines)


def test_a_config_is_checked_without_torch(tmp_path: Path) -> None:
    """torch takes longer to import than anything else that a mistake waits for."""
    path = tmp_path / "a.yaml"
    path.write_text(instead(model="{name: cnn, layers: [relu]}", loss="{name: mse, a: 1}"))
    code = f"""
import sys
from pathlib import Path
from dltrain import config, reference, schema
from dltrain.errors import ConfigError
try:
    config.load(Path({str(path)!r}))
except ConfigError as error:
    print(error)
config.load(Path({str(path)!r}), ["loss=mse"])
schema.schema(), reference.markdown()
print(sorted({{"torch", "torchvision", "sklearn", "matplotlib", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{path}:5: loss.a: unknown key; there are no settings here\n[]\n"


@pytest.mark.parametrize("name", shipped.names())
def test_config_show_prints_a_config_that_means_the_same(dltrain: Run, name: str, tmp_path: Path) -> None:
    done = dltrain("config", "show", name, "--set", "seed=7")
    assert done.code == 0
    path = tmp_path / "shown.yaml"
    path.write_text(done.out)
    assert config.load(path) == config.load(shipped.find(name), ["seed=7"])
    assert config.load(path).seed == 7


def test_config_check_checks_every_file(dltrain: Run, tmp_path: Path) -> None:
    for name, text in (("good", START), ("bad", instead(loss="msee")), ("worse", "a: [")):
        (tmp_path / f"{name}.yaml").write_text(text)
    done = dltrain("config", "check", "bad.yaml", "good.yaml", "worse.yaml")
    assert (done.code, done.out) == (2, "good.yaml: ok\n")
    first, second = done.err.splitlines()
    assert first == "error: bad.yaml:5: loss: unknown loss 'msee'; did you mean 'mse'?"
    assert second.startswith("error: worse.yaml:2: not YAML")
    done = dltrain("config", "check", "good.yaml", "--set", "optim.lrr=1")
    assert (done.code, done.err) == (2, "error: --set optim.lrr=1: optim.lrr: unknown key; did you mean 'lr'?\n")


def test_config_schema_prints_json_and_nothing_else(dltrain: Run) -> None:
    done = dltrain("config", "schema")
    assert (done.code, json.loads(done.out), done.err) == (0, schema.schema(), "")


def test_config_list_has_every_shipped_config(dltrain: Run) -> None:
    done = dltrain("config", "list")
    assert done.code == 0
    assert all(name in done.out for name in shipped.names())


def test_a_section_with_a_default_need_not_name_it() -> None:
    config = check(START + "loss: {label_smoothing: 0.1}\nschedule: {warmup_epochs: 2}\n")
    assert (config.loss.name, config.loss.args["label_smoothing"]) == ("cross_entropy", 0.1)
    assert (config.schedule.name, config.schedule.args["warmup_epochs"]) == ("constant", 2.0)
