"""What a user can look up: complete, readable in a narrow terminal, and the same in docs/reference.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from dltrain import reference, registry, schema
from dltrain.registry import KINDS

FILE = Path(__file__).parent.parent / "docs" / "reference.md"
EVERY = [entry for kind in KINDS for entry in registry.entries(kind)]


def test_docs_reference_md_is_what_the_signatures_say() -> None:
    assert FILE.read_text(encoding="utf-8") == reference.markdown(), (
        "stale: run `dltrain list --markdown > docs/reference.md`"
    )


def test_list_markdown_prints_it(dltrain: Run) -> None:
    done = dltrain("list", "--markdown")
    assert (done.code, done.out, done.err) == (0, reference.markdown(), "")


def test_every_component_and_setting_is_in_the_markdown() -> None:
    text = reference.markdown()
    for entry in EVERY:
        assert f"\n### `{entry.name}`\n\n{entry.summary}\n" in text
        for name in entry.arguments.model_fields:
            assert f"\n| `{name}` | " in text
    for settings in schema.SECTIONS.values():
        for name in set(settings.model_fields) - {"source"}:
            assert f"\n| `{name}` | " in text


def test_every_table_has_four_columns_and_every_link_a_heading() -> None:
    text = reference.markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = [heading.strip("`").lower().replace(" ", "-") for heading in headings]
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert links
    assert {link: anchors.count(link) for link in links} == dict.fromkeys(links, 1)  # GitHub numbers the others


@pytest.mark.parametrize(
    ("row"),
    [
        "| `lr` | number > 0 | required | step size |",
        "| `loss` | [loss](#losses) | `cross_entropy` | what is minimised |",
        "| `descent` | [settings](#descent) |  | how many images make one step |",
        "| `seed` | whole number >= 0 | `0` | where all randomness comes from |",
        "| `activation` | [activation](#activations) | `relu` | after each hidden layer |",
        "| `verify` | `true` or `false` | `true` | compare the files with their published checksums |",
        "| `labels` | `fine` or `coarse` | `fine` | fine: the hundred kinds; coarse: the twenty groups |",
        "| `layers` | list of ([layer](#layers) or [activation](#activations)) | required | what is repeated |",
    ],
)
def test_a_row_says_key_type_default_and_meaning(row: str) -> None:
    assert f"\n{row}\n" in reference.markdown()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number >= 0 and < 1"),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 255}, "whole number > 0 and <= 255"),
        ({"anyOf": [{"type": "integer"}, {"enum": ["same", "valid"]}]}, "whole number, `same` or `valid`"),
        ({"anyOf": [{"type": "integer"}, {"const": "classes", "type": "string"}]}, "whole number or `classes`"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "number or `null`"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of (`a` or `b`)"),
        ({"$ref": "#/$defs/activation_item"}, "activation"),
        ({"type": "boolean"}, "`true` or `false`"),
        ({"type": "string", "pattern": "^cuda:[0-9]{1,3}$"}, "cuda:N"),
        ({"type": "string", "pattern": "^x$"}, "text"),
        ({}, "anything"),
    ],
)  # fmt: skip
def test_types_in_words(found: dict[str, Any], words: str) -> None:
    assert reference.describe_type(found) == words


@pytest.mark.parametrize("columns", [40, 80])
def test_list_is_readable_in_a_narrow_terminal(dltrain: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = dltrain("list")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line != line.rstrip()]
    words = " ".join(done.out.split())
    for entry in EVERY:
        assert entry.name in lines  # a line of its own, not indented
        assert entry.summary in words
        for name, field in entry.arguments.model_fields.items():
            assert f" {name}: " in words
            assert " ".join(str(field.description).split()) in words


def test_list_of_one_kind_has_that_kind_alone(dltrain: Run) -> None:
    done = dltrain("list", "optim")
    assert done.code == 0
    assert done.out.startswith("optim: optimizers\n\nadadelta\n  Adadelta (Zeiler 2012)")
    assert "\nsgd\n  Gradient descent, " in done.out
    assert (
        "    lr: number > 0; required\n        step size\n    momentum: number >= 0 and < 1; default `0.0`\n"
        in done.out
    )
    others = {entry.name for entry in EVERY if entry.kind != "optim"}
    assert not others & set(done.out.splitlines())


@pytest.mark.parametrize(("kind", "near"), [("optimizer", "optim"), ("layers", "layer"), ("Loss", "loss")])
def test_list_of_no_kind_suggests_one(dltrain: Run, kind: str, near: str) -> None:
    done = dltrain("list", kind)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: no kind of component is called '{kind}'; did you mean '{near}'?\n"


def test_list_of_nonsense_names_the_kinds(dltrain: Run) -> None:
    done = dltrain("list", "zzz")
    assert done.code == 2
    assert done.err == f"error: no kind of component is called 'zzz'; there is {', '.join(sorted(KINDS))}\n"


def test_a_component_without_documentation_is_listed_too(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(each) for kind, each in registry._entries.items()})

    @registry.register("loss")
    def bare(outputs: object, targets: object, *, pairs: tuple[int, int] = (1, 2), other: Any = None) -> None:
        """other: one | the other"""

    assert "bare" in dltrain("list", "loss").out.splitlines()
    assert "| `pairs` | list of anything | `[1, 2]` |  |" in reference.markdown()
    assert "| `other` | anything | `null` | one &#124; the other |" in reference.markdown()
