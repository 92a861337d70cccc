"""Templates: what they write out, where their mistakes are told, and that they stay within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from dltrain import config as configs
from dltrain import schema, yamlfile
from dltrain.build import build_model
from dltrain.errors import ConfigError

HEAD = "name: x\ndata: digits\noptim: adam\nmodel:\n  name: cnn\n"


def load(model: str) -> configs.Config:
    return configs.check(yamlfile.parse(HEAD + model, "f"))


def layers(model: str) -> Any:
    return load(model).plain()["model"]["layers"]


BLOCK = """
  define:
    block:
      stride: 1
      layers:
        - conv: {out: $out, stride: $stride, padding: same, bias: false}
        - batchnorm
        - relu
    stage:
      layers:
        - block: {out: $width, stride: 2}
        - repeat: {times: 2, layers: [{block: $width}]}
        - residual: [block: {out: $width}, $activation]
        - concat: [[identity], [block: {out: $width}, relu]]
    head: [globalpool, {linear: classes}]
"""


def conv(out: int, stride: int) -> list[Any]:
    return [{"conv": {"out": out, "stride": stride, "padding": "same", "bias": False}}, "batchnorm", "relu"]


def test_templates_are_the_layers_written_out():
    found = load(BLOCK + "  layers: [{block: 8}, {stage: {width: 16, activation: {leaky_relu: 0.2}}}, tanh, head]")
    written = [
        *conv(8, 1),
        *conv(16, 2),
        {"repeat": {"times": 2, "layers": conv(16, 1)}},
        {"residual": [*conv(16, 1), {"leaky_relu": 0.2}]},
        {"concat": [["identity"], [*conv(16, 1), "relu"]]},
        "tanh",
        "globalpool",
        {"linear": "classes"},
    ]
    plain = {"name": "x", "data": "digits", "optim": "adam", "model": {"name": "cnn", "layers": written}}
    assert found == configs.check(yamlfile.Document("f", plain))
    assert build_model(found, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_resolved_config_has_no_templates_and_loads_as_the_same():
    found = load(BLOCK + "  layers: [{stage: {width: 16, activation: relu}}, head]")
    assert "define" not in found.plain()["model"]
    assert configs.check(yamlfile.parse(found.yaml(), "again")) == found


@pytest.mark.parametrize(
    ("define", "use", "written"),
    [
        ("a: [dropout]", "a", "{dropout: 0.5}"),
        ("a: {layers: [dropout: $x]}", "a: 0.25", "{dropout: 0.25}"),
        ("a: {layers: [dropout: $x]}", "a: {x: 0.25}", "{dropout: 0.25}"),
        ("a: {x: 0.1, layers: [dropout: $x]}", "a: 0.25", "{dropout: 0.25}"),
        ("a: {x: 0.1, layers: [dropout: $x]}", "a", "{dropout: 0.1}"),
        ("a: {x: 0.1, layers: [dropout: $x]}", "a: {}", "{dropout: 0.1}"),
        ("a: {x: 0.1, layers: [dropout: $x]}", "{a: }", "{dropout: 0.1}"),
        # the parameter without a default is the one that is meant
        ("a: {y: 3, layers: [conv: {out: $x, kernel: $y}]}", "a: 4", "conv: {out: 4, kernel: 3}"),
        ("a: {layers: [conv: {out: 4, bias: $x}]}", "a: false", "conv: {out: 4, bias: false}"),
        ("a: {layers: [maxpool: {stride: $x}]}", "a: {x: null}", "maxpool: {stride: null}"),
        ("a: {layers: [conv: {out: 4, kernel: $x}]}", "a: {x: [1, 3]}", "conv: {out: 4, kernel: [1, 3]}"),
        # a value may be layers, or the name of a template
        ("{a: {layers: [residual: $x]}, b: [tanh]}", "a: {x: [relu, b]}", "residual: [relu, tanh]"),
        ("{a: {layers: [$x]}, b: [tanh]}", "a: b", "tanh"),
        # a parameter passed on under its own name is the caller's
        ("{a: {layers: [{b: {x: $x}}]}, b: {layers: [dropout: $x]}}", "a: 0.3", "{dropout: 0.3}"),
        ("{a: {x: 0.3, layers: [b: $x]}, b: {x: 0.1, layers: [dropout: $x]}}", "a", "{dropout: 0.3}"),
    ],
)
def test_parameters_become_their_values(define, use, written):
    nested = define if define.startswith("{") else f"{{{define}}}"
    assert layers(f"  define: {nested}\n  layers: [{use}]") == layers(f"  layers: [{written}]")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "  define:\n    a:\n      - conv: {out: $out}\n  layers:\n    - a: {otu: 3}",
            "f:10: model.layers.0.a.otu: unknown key; did you mean 'out'?",
        ),
        (
            "  define:\n    a: [conv: {out: $out}]\n  layers:\n    - relu\n    - a",
            "f:10: model.layers.1: expected a value for $out, got nothing",
        ),
        (
            "  define:\n    a: [conv: {out: $out}, conv: {out: $otu}]\n  layers:\n    - a: {out: 3}",
            "f:9: model.layers.0.a: expected a value for $otu (or does the template mean $out by it?), got nothing",
        ),
        (
            "  define:\n    a:\n      out: 3\n      layers: [conv: {out: $otu}]\n  layers: [a]",
            "f:8: model.define.a.out: unknown key; did you mean 'otu'?",
        ),
        (  # a wrong value is told where it stands: at the use, in the defaults, or in the template
            "  define:\n    a: [conv: {out: $out}]\n  layers:\n    - relu\n    - a: {out: -3}",
            "f:10: model.layers.1.a.out: expected a whole number of more than 0 or classes, got -3",
        ),
        (
            "  define:\n    a:\n      out: wide\n      layers: [conv: {out: $out}]\n  layers:\n    - relu\n    - a",
            "f:8: model.define.a.out: expected a whole number or classes, got 'wide'",
        ),
        (
            "  define:\n    a:\n      - relu\n      - residual:\n        - conv: {out: 3, kernl: 3}\n  layers: [a, a]",
            "f:10: model.define.a.1.residual.0.conv.kernl: unknown key; did you mean 'kernel'?",
        ),
        (
            "  define:\n    a:\n      - relu\n      - conv: {kernel: 3}\n  layers: [a, a]",
            "f:9: model.define.a.1.conv.out: missing",
        ),
        (
            "  define:\n    a: [relu]\n  layers:\n    - a\n    - conv: {out: 0}",
            "f:10: model.layers.1.conv.out: expected a whole number of more than 0 or classes, got 0",
        ),
        (
            "  define:\n    block: [relu]\n  layers:\n    - relu\n    - blok",
            "f:10: model.layers.1: unknown layer 'blok'; did you mean 'block'?",
        ),
        (
            "  define:\n    a: [relu]\n  layers:\n    - a\n    - conv: $x",
            "f:10: model.layers.1.conv: expected a whole number or classes, got '$x'",
        ),
        (
            "  define:\n    a: [relu, b]\n    b:\n      - a\n  layers: [a]",
            "f:9: model.define.b.0: expected a template that does not use itself, got 'a'",
        ),
        (
            "  define:\n    relu: [tanh]\n  layers: [relu]",
            "f:7: model.define.relu: expected a name that no layer has, got 'relu'",
        ),
        ("  define:\n    a: {out: 3}\n  layers: [a]", "f:7: model.define.a.layers: missing"),
        ("  define:\n    a: []\n  layers: [a]", "f:7: model.define.a: expected a list of layers, got a list of 0"),
        ("  define:\n    a:\n  layers: [a]", "f:7: model.define.a: expected a list of layers, got nothing"),
        ("  define: [a]\n  layers: [a]", "f:6: model.define: expected settings (key: value), got a list of 1"),
        ("  define: {a: [relu]}\n  layers:\n    - a: 3", "f:8: model.layers.0.a: expected no settings, got 3"),
        (
            "  define: {a: [conv: {out: $x, kernel: $y}]}\n  layers:\n    - a: 3",
            "f:8: model.layers.0.a: expected settings (x, y), got 3",
        ),
        ("  define: {a: [relu]}", "f:4: model.layers: missing"),
        (
            "  define: {a: [relu]}\n  layers: [a]\n  init: kaming",
            "f:8: model.init: unknown init 'kaming'; did you mean 'kaiming'?",
        ),
    ],
)
def test_a_mistake_is_told_once_at_the_line_where_it_stands(model, said):
    with pytest.raises(ConfigError) as caught:
        load(model)
    assert str(caught.value) == said


def many(count: int, body: str, last: str = "relu") -> str:
    """Templates a0, a1, …: in each body, NEXT is the one after it."""
    lines = [f"    a{i}: [{body.replace('NEXT', f'a{i + 1}')}]" for i in range(count)]
    return "\n".join(["  define:", *lines, f"    a{count}: [{last}]", ""])


@pytest.mark.parametrize(
    ("model", "bound"),
    [
        (many(30, "NEXT, NEXT, NEXT") + "  layers: [a0]", "at most 10,000 values"),
        (
            many(30, "{NEXT: {x: [residual: $x, residual: $x]}}", "residual: $x") + "  layers: [{a0: {x: [relu]}}]",
            "values",
        ),
        (f"  define: {{a: [{', '.join(['relu'] * 3000)}]}}\n  layers: [a, a, a, a]", "at most 10,000 values"),
        (many(2000, "NEXT") + "  layers: [a0]", "nested at most 40 deep"),
        (many(30, "residual: [NEXT]") + "  layers: [a0]", "nested at most 40 deep"),
    ],
)
def test_templates_cannot_grow_without_bounds(model, bound):
    with pytest.raises(ConfigError, match=f"model.layers: expected .*{bound}"):
        load(model)


def test_an_override_reaches_a_templates_default_and_a_use():
    model = "  define: {a: {x: 0.1, layers: [dropout: $x]}}\n  layers: [a, {a: {x: 0.2}}]"
    document = yamlfile.parse(HEAD + model, "f")
    found = configs.check(document, ["model.define.a.x=0.3", "model.layers.1.a.x=0.4"]).plain()["model"]["layers"]
    assert found == [{"dropout": {"probability": 0.3}}, {"dropout": {"probability": 0.4}}]
    with pytest.raises(ConfigError, match=r"^--set model.define.a.x=2: model.define.a.x: expected less than 1, got 2$"):
        configs.check(document, ["model.define.a.x=2"])


@pytest.mark.parametrize(
    ("model", "right"),
    [
        (BLOCK + "  layers: [{block: 8}, {stage: {width: 16, activation: relu}}, head]", True),
        ("  layers: [head]", False),
        ("  define: {a: 3}\n  layers: [relu]", False),
        ("  define: {a: {x: 3}}\n  layers: [relu]", False),
        ("  define: {a: [relu]}", False),
        ("  define: {a: [relu]}\n  layers: [a]\n  initial: zeros", False),
    ],
)
def test_the_json_schema_knows_templates(model, right):
    whole = schema.schema()
    models = Draft202012Validator({**whole["$defs"]["model_section"], "$defs": whole["$defs"]})
    assert models.is_valid(yamlfile.parse(HEAD + model, "f").data["model"]) is right
