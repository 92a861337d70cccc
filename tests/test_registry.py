"""A signature is a schema: what can be registered, what comes of it, and that everything shipped is documented."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

import dltrain.components  # noqa: F401  registers what is shipped
from dltrain import config, registry, schema
from dltrain.errors import ConfigError
from dltrain.registry import KINDS, Activation, Component, Entry, Positive, component, find, nearest, register, suggest

SHIPPED = [entry for kind in KINDS for entry in registry.entries(kind)]
shipped = pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: f"{entry.kind}-{entry.name}")


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(each) for kind, each in registry._entries.items()})


def my_huber(outputs: object, targets: object, *, delta: Positive = 1.0, kind: Literal["a", "b"]) -> tuple[Any, ...]:
    """Squared near zero,
    absolute beyond `delta`.

    delta: where the square ends,
      in units of the output
    kind: which
    """
    return outputs, targets, delta, kind


def test_a_function_is_registered_under_its_name_with_its_arguments() -> None:
    assert register("loss", source="somewhere")(my_huber) is my_huber
    entry = find("my_huber", "loss")
    assert (entry.kind, entry.name, entry.factory) == ("loss", "my_huber", my_huber)
    assert entry.summary == "Squared near zero, absolute beyond `delta`."
    assert entry.facts == {"source": "somewhere"}
    assert entry.required() == ["kind"]
    fields = entry.arguments.model_fields
    assert {name: field.description for name, field in fields.items()} == {
        "delta": "where the square ends, in units of the output",
        "kind": "which",
    }
    found = component(entry, {"kind": "b", "delta": 2})
    assert found == Component("loss", "my_huber", {"delta": 2.0, "kind": "b"})
    assert found("x", "y") == ("x", "y", 2.0, "b")
    assert found.plain() == {"delta": 2.0, "kind": "b"}


def test_a_name_may_be_given() -> None:
    register("loss", "my_smooth_l1")(my_huber)
    assert "my_smooth_l1" in registry.names("loss")
    assert "my_huber" not in registry.names("loss")


def test_a_class_is_registered_by_its_init() -> None:
    @register("layer")
    class Scale:
        """Multiplies.

        by: the factor
        """

        def __init__(self, shape: object, outputs: object, *, by: float = 2.0, bias: bool) -> None:
            self.seen = (shape, outputs, by, bias)

    entry = find("Scale", "layer")
    assert list(entry.arguments.model_fields) == ["by", "bias"]
    assert entry.arguments.model_fields["by"].description == "the factor"
    assert component(entry, {"bias": True})("s", "o").seen == ("s", "o", 2.0, True)


SOURCE = '''
from typing import Annotated

from pydantic import Field

from dltrain.registry import Positive, register


class Torch:
    """Stands for a module that is slow to import, or that is not there at all."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was looked up")


torch = Torch()


@register("optim")
def own(params: "torch.Tensor", *, lr: Positive, rho: Annotated[float, Field(lt=3)] = 1.0) -> "torch.Optimizer":
    """Mine."""
    return params, lr, rho
'''


@pytest.mark.parametrize("first", ["", "from __future__ import annotations\n"])
def test_annotations_may_be_objects_or_text(tmp_path: Path, first: str) -> None:
    """Only those of keyword arguments are evaluated: the others would import torch."""
    path = tmp_path / "own.py"
    path.write_text(first + SOURCE)
    spec = importlib.util.spec_from_file_location("own", path)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    entry = find("own", "optim")
    assert component(entry, {"lr": 1})("p") == ("p", 1.0, 1.0)
    for wrong in ({"lr": 0}, {"lr": 1, "rho": 3}, {}, {"lr": 1, "x": 1}, {"lr": "1"}):
        with pytest.raises(ValidationError):
            component(entry, wrong)


def without_annotation(outputs: Any, targets: Any, *, delta=1.0) -> None: ...  # type: ignore[no-untyped-def]


def with_any_arguments(outputs: Any, targets: Any, **settings: float) -> None: ...


def with_a_name(outputs: Any, targets: Any, *, name: str) -> None: ...


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (without_annotation, "without_annotation: argument 'delta' needs a type annotation"),
        (with_any_arguments, r"with_any_arguments: \*\*settings hides its arguments"),
        (with_a_name, "with_a_name: an argument cannot be called 'name'"),
    ],
)
def test_what_is_no_schema_is_refused(factory: Callable[..., Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        register("loss")(factory)
    assert factory.__name__ not in registry.names("loss")


def test_a_name_is_registered_once_in_a_kind() -> None:
    register("loss")(my_huber)
    with pytest.raises(ValueError, match="loss 'my_huber' is registered twice"):
        register("loss")(my_huber)
    with pytest.raises(ValueError, match="loss 'mse' is registered twice"):
        register("loss", "mse")(my_huber)
    register("layer")(my_huber)  # another kind
    assert find("my_huber", "layer").kind == "layer"


def test_the_kind_is_one_that_there_is() -> None:
    with pytest.raises(ValueError, match="no kind of component is called 'lossy'; did you mean 'loss'"):
        register("lossy")


def test_find_suggests_the_nearest_name() -> None:
    with pytest.raises(KeyError) as caught:
        find("reul", "layer", "activation")
    assert caught.value.args == ("unknown layer 'reul'; did you mean 'relu'?",)
    assert find("relu", "layer", "activation").kind == "activation"


@pytest.mark.parametrize(
    ("word", "near"),
    [("sgdd", "sgd"), ("SGD", "sgd"), ("Adam-W", "adamw"), ("warmup", "warmup_epochs"), ("zzz", None), ("", None)],
)
def test_the_nearest_name_is_suggested_or_all(word: str, near: str | None) -> None:
    names = ["warmup_epochs", "sgd", "adamw"]
    assert nearest(word, names) == (f"; did you mean '{near}'?" if near else "")
    assert suggest(word, names) == (nearest(word, names) or "; there is adamw, sgd, warmup_epochs")
    assert suggest(word, []) == ""


def test_a_factorys_value_error_becomes_the_users() -> None:
    @register("loss")
    def picky(outputs: object) -> None:
        """Picks."""
        raise ValueError("loss.x: expected y")

    with pytest.raises(ConfigError, match=r"loss picky: loss\.x: expected y"):
        component(find("picky", "loss"), {}).build(1)


def test_components_nest_in_arguments() -> None:
    @register("model")
    def wrap(shape: object, outputs: object, *, act: Activation, acts: list[Activation] = []) -> Any:  # noqa: B006
        """Wraps."""
        return act, acts

    found = component(find("wrap", "model"), {"act": "relu", "acts": [{"leaky_relu": 0.5}, {"tanh": None}]})
    act, acts = found((), 1)
    assert act.name == "relu"
    assert [(each.name, each.args) for each in acts] == [("leaky_relu", {"slope": 0.5}), ("tanh", {})]
    assert found.plain() == {"act": "relu", "acts": [{"leaky_relu": {"slope": 0.5}}, "tanh"]}
    assert component(find("wrap", "model"), found.plain()) == found
    assert component(find("wrap", "model"), found.args) == found  # what is a component already stays one


@shipped
def test_every_component_says_what_it_is(entry: Entry) -> None:
    assert entry.summary.endswith("."), "a sentence"
    assert entry.summary.count(". ") <= 1
    assert len(entry.summary) <= 150, "one line in the reference"
    for name, field in entry.arguments.model_fields.items():
        assert field.description, f"{name} needs a line `{name}: …` in the docstring"


@shipped
def test_every_documented_argument_is_one(entry: Entry) -> None:
    """A line `name: text` that no argument bears is a typo, or a leftover."""
    _, documented = registry.read_docstring(inspect.getdoc(entry.factory) or "")
    written = {name for name in documented if name.islower()}  # prose may begin with a capital: `CIFAR-10: …`
    assert written <= set(entry.arguments.model_fields)


@shipped
def test_every_default_is_what_its_own_annotation_takes(entry: Entry) -> None:
    for name, field in entry.arguments.model_fields.items():
        if not field.is_required():
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            default = field.get_default(call_default_factory=True)
            checked = TypeAdapter(kind).validate_python(default, strict=True)
            assert checked == default, name


@shipped
def test_no_argument_hides_behind_a_shared_setting(entry: Entry) -> None:
    shared = set(config.Data.model_fields) | {"name"} if entry.kind == "data" else {"name", "source"}
    if entry.kind == "model":
        shared |= set(config.Model.model_fields)
    assert not shared & set(entry.arguments.model_fields)


@pytest.mark.parametrize("name", ["top level", *schema.SECTIONS])
def test_every_setting_of_the_config_is_documented(name: str) -> None:
    settings = schema.SECTIONS.get(name, config.Config)
    assert schema.summary(settings).endswith(".")
    for key, found in schema.section(settings)["properties"].items():
        assert found.get("description"), key


def test_a_documentation_line_ends_where_its_indentation_does() -> None:
    text = "Title.\n\nProse: with a colon in it.\n\na: one\n  two\n    three\nb_2: four\n\n  c: no\n"
    assert registry.read_docstring(text) == (
        "Title.",
        {"Prose": "with a colon in it.", "a": "one two three", "b_2": "four"},
    )
    assert registry.read_docstring("") == ("", {})


def test_a_component_is_strict() -> None:
    register("loss")(my_huber)
    entry = find("my_huber", "loss")
    for wrong in ({"kind": "c"}, {"kind": "a", "delta": "1"}, {"kind": "a", "delta": True}, {"kind": "a", "Delta": 1}):
        with pytest.raises(ValidationError):
            component(entry, wrong)
