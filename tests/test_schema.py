"""The JSON schema agrees with what loading a config says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dltrain import config, registry, schema, shipped, yamlfile
from dltrain.errors import ConfigError
from dltrain.registry import Activation, Component, register

SCHEMA = schema.schema()
VALIDATOR = Draft202012Validator(SCHEMA)

EVERYTHING = """
name: everything
seed: 3
data: {name: cifar100, labels: coarse, root: /data, verify: false, val: 0.1, classes: [3, whale], limit: 100,
       augment: [flip, {flip: 0.25}, {translate: {pixels: 4, pad: reflect}}, {cutout: 8}]}
model:
  name: cnn
  layers:
    - conv: {out: 32, kernel: 3, padding: same, bias: false}
    - batchnorm
    - relu:
    - leaky_relu: 0.1
    - residual:
        shortcut: projection
        layers:
          - repeat: {times: 2, layers: [{conv: {out: 8, padding: 1}}, batchnorm, gelu]}
    - residual: [relu, {dropout: 0.1}]
    - maxpool: {size: 3, stride: null}
    - avgpool: 2
    - globalpool: max
    - linear: classes
  output: softmax
loss: {name: cross_entropy, label_smoothing: 0.1, class_weights: [1, 2.5]}
descent: {variant: mini-batch, batch_size: 64, micro_batch_size: null}
optim: {name: sgd, lr: 1e-3, momentum: 0, nesterov: false}
schedule: {name: one_cycle, warmup_epochs: null}
train: {epochs: 3, device: 'cuda:1', precision: bf16, clip_norm: 1, choose_by: last, checkpoint_every_minutes: 0.5}
"""


def start(**sections: Any) -> dict[str, Any]:
    return {"name": "x", "data": "digits", "model": "perceptron", "optim": "adam", **sections}


def layers(*items: Any) -> dict[str, Any]:
    return start(model={"name": "cnn", "layers": [*items]})


RIGHT = [
    yamlfile.parse(EVERYTHING, "everything").data,
    start(),
    start(loss={"label_smoothing": 0.1}, schedule={"warmup_epochs": 1}),
    start(loss="mse", schedule={"name": "step", "every_epochs": 1}, descent={}, train={}),
    start(optim={"name": "sgd", "lr": 1}, loss={"name": "bce"}),
    start(model={"name": "mlp", "hidden": [], "activation": {"elu": {"alpha": 2}}}),
    start(train={"device": "cuda:12"}),
    layers({"repeat": {"times": 1, "layers": ["flatten"]}}, {"flatten": None}, {"relu": {}}),
]
WRONG = [
    {key: value for key, value in start().items() if key != "data"},
    start(losss="mse"),
    start(loss="msee"),
    start(loss=None),
    start(loss={"name": "mse", "reduction": "sum"}),
    start(loss=["mse"]),
    start(optim="sgd"),
    start(optim={"name": "sgd"}),
    start(optim={"lr": 0.1}),
    start(optim={"name": "sgd", "lr": 0}),
    start(optim={"name": "sgd", "lr": "0.1"}),
    start(optim={"name": "sgd", "lr": True}),
    start(optim={"name": "sgd", "lr": 1, "momentum": 1}),
    start(optim={"name": "adam", "nesterov": True}),
    start(data={"name": "digits", "labels": "fine"}),
    start(data={"name": "digits", "source": "x"}),
    start(data={"name": "digits", "val": 1.5}),
    start(data={"name": "digits", "val": -1}),
    start(data={"name": "digits", "classes": [1]}),
    start(data={"name": "digits", "augment": "flip"}),
    start(data={"name": "digits", "augment": ["translate"]}),
    start(data={"name": "digits", "augment": [{"flip": 1, "cutout": 2}]}),
    start(data={"name": "digits", "augment": [{"cutout": {"size": 3, "fill": 256}}]}),
    start(data={"name": "digits", "augment": ["relu"]}),
    start(model="mlp"),
    start(model={"name": "mlp", "hidden": [0]}),
    start(model={"name": "mlp", "hidden": [3], "activation": "conv"}),
    start(model={"name": "perceptron", "output": "linear"}),
    start(model={"name": "perceptron", "layers": []}),
    layers(),
    layers("conv"),
    layers({"conv": {"kernel": 3}}),
    layers({"conv": None}),
    layers({"conv": {"out": 3, "padding": "full"}}),
    layers({"repeat": 3}),
    layers({"relu": 3}),
    layers({"residual": ["relu", {"repeat": {"times": 0, "layers": ["relu"]}}]}),
    layers({}),
    layers(3),
    start(descent="batch"),
    start(descent={"variant": "mini_batch"}),
    start(train={"epoch": 3}),
    start(train={"epochs": 1.5}),
    start(train={"device": "gpu"}),
    start(train={"device": "cuda:x"}),
    start(train={"deterministic": "yes"}),
    start(name="a/b"),
    start(name=""),
    start(seed=-1),
    start(seed=None),
    ["not", "a", "mapping"],
    None,
]


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["title"] == "dltrain config"


def test_every_reference_leads_somewhere() -> None:
    found = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.update({node["$ref"]} if "$ref" in node else ())
            node = list(node.values())
        for each in node if isinstance(node, list) else ():
            walk(each)

    walk(SCHEMA)
    assert found == {f"#/$defs/{name}" for name in SCHEMA["$defs"]}


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_config_fits(name: str) -> None:
    VALIDATOR.validate(yamlfile.read(shipped.folder() / f"{name}.yaml").data)


@pytest.mark.parametrize(("data", "right"), [*((data, True) for data in RIGHT), *((data, False) for data in WRONG)])
def test_the_schema_and_loading_agree(data: Any, right: bool) -> None:
    assert VALIDATOR.is_valid(data) is right
    try:
        config.check(yamlfile.Document("f", data))
    except ConfigError:
        loads = False
    else:
        loads = True
    assert loads is right


def test_the_name_is_the_files_where_it_is_left_out() -> None:
    assert VALIDATOR.is_valid({key: value for key, value in start().items() if key != "name"})


def test_defaults_and_documentation_are_there_for_an_editor() -> None:
    properties = SCHEMA["properties"]
    assert (properties["loss"]["default"], properties["schedule"]["default"]) == ("cross_entropy", "constant")
    assert "default" not in properties["optim"]
    assert properties["train"]["properties"]["epochs"] == {
        "type": "integer",
        "exclusiveMinimum": 0,
        "default": 10,
        "description": "how often each training image is seen",
    }
    mlp = schema.section(registry.find("mlp", "model").arguments)
    assert mlp["properties"]["activation"] == {
        "$ref": "#/$defs/activation_item",
        "default": "relu",
        "description": "after each hidden layer",
    }
    assert mlp["required"] == ["hidden"]


def test_a_default_component_with_settings_is_written_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(each) for kind, each in registry._entries.items()})
    steep, usual = (Component("activation", "leaky_relu", {"slope": slope}) for slope in (0.5, 0.01))

    @register("model")
    def own(shape: object, outputs: object, *, a: Activation = steep, b: Activation = usual) -> None:
        """Anything."""

    found = schema.section(registry.find("own", "model").arguments)["properties"]
    assert found["a"]["default"] == {"leaky_relu": {"slope": 0.5}}
    assert found["b"]["default"] == "leaky_relu"
    assert {"const": "own"} in [
        each["properties"]["name"] for each in schema.schema()["$defs"]["model_section"]["anyOf"][1:]
    ]
