"""YAML is read as written, with lines, and no input does anything but that or a ConfigError."""

from __future__ import annotations

import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain import yamlfile
from dltrain.errors import ConfigError
from dltrain.yamlfile import MAX_BYTES, MAX_DEPTH, MAX_VALUES, dump, parse, read

LOADERS = [getattr(yaml, "CSafeLoader", yaml.SafeLoader), yaml.SafeLoader]

ORDINARY = """\
# a comment
name: cifar10_cnn   # another

data:
  name: cifar10
  val: 5000
  augment: [flip, {translate: 4}]
model:
  layers:
  - conv:
      out: 32
      padding: same
  - relu
  - linear: classes
optim: {name: sgd, lr: 0.1, nesterov: true, weight_decay: 5.0e-4}
note: >
  folded
  text
quoted: "é\\n\\u0041"
single: 'it''s'
empty:
seed: &seed 0
again: *seed
"""


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyYAML's C parser, and without it."""
    monkeypatch.setattr(yamlfile, "_LOADER", request.param)


def mistake(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.yaml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, None) for text in ("", "~", "null", "Null", "NULL")),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        ("0", 0),
        ("-0", 0),
        ("+12", 12),
        ("-7", -7),
        ("999999999999999999", 10**18 - 1),
        ("1e-3", 0.001),
        ("5.0e-4", 0.0005),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5E+2", -50.0),
        ("1e3", 1000.0),
        ("0.30000000000000004", 0.1 + 0.2),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("+.INF", math.inf),
        # text: in YAML 1.1 these are booleans, octal, base 60, grouped digits, dates
        *(
            (text, text)
            for text in ("no", "Yes", "on", "OFF", "y", "nULL", "012", "-08", "1:30", "1_000", "2024-01-01")
        ),
        *(
            (text, text)
            for text in ("0x1F", "0o17", "0b1", "1e", "e3", ".", "1.2.3", "- 1", "+-1", "inf", "nan", "1 2")
        ),
    ],
)
def test_a_plain_scalar_is_read_by_yaml_1_2(text: str, value: Any) -> None:
    found = yamlfile.scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_not_a_number_is_one() -> None:
    assert math.isnan(yamlfile.scalar(".nan"))


def test_quoted_scalars_are_text(loader: None) -> None:
    text = "- '1'\n- \"true\"\n- ''\n- |\n  2\n- >\n  null\n"
    assert parse(text, "f").data == ["1", "true", "", "2\n", "null\n"]


def test_ordinary_documents_are_read_as_by_pyyaml(loader: None) -> None:
    assert parse(ORDINARY, "f").data == yaml.safe_load(ORDINARY)


def test_every_value_knows_its_line(loader: None) -> None:
    lines = parse(ORDINARY, "f.yaml").lines
    written = ORDINARY.splitlines()
    for place, line in lines.items():
        if place and isinstance(place[-1], str):
            assert place[-1] in written[line - 1]
    expected = {
        (): 2,
        ("name",): 2,
        ("data",): 4,
        ("data", "val"): 6,
        ("data", "augment", 1, "translate"): 7,
        ("model", "layers", 0): 10,
        ("model", "layers", 0, "conv"): 10,
        ("model", "layers", 0, "conv", "padding"): 12,
        ("model", "layers", 1): 13,
        ("model", "layers", 2, "linear"): 14,
        ("optim", "lr"): 15,
        ("empty",): 21,
        ("again",): 23,
    }
    assert {place: lines.get(place) for place in expected} == expected


def test_a_place_without_a_line_has_that_of_what_is_around_it() -> None:
    document = parse("a: 1\nb: &x\n  c: [1, 2]\nd: *x\n", "f.yaml")
    assert document.where(("b", "c", 1)) == "f.yaml:3"
    assert document.where(("b", "nothing", "here")) == "f.yaml:2"
    assert document.where(("d", "c", 1)) == "f.yaml:4"  # where the alias stands
    assert yamlfile.Document("meta", {}).where(("a",)) == "meta"


def test_what_an_alias_gives_is_a_copy() -> None:
    data = parse("a: &x [1, {b: 2}]\nc: *x\n", "f").data
    data["a"][1]["b"] = 3
    assert data["c"] == [1, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not YAML"),
        ("a: 1\n b: 2\n", 2, "not YAML: mapping values are not allowed"),
        ("a: 'b\nc: 3\n", 3, "from line 1 on"),
        ("a:\n\tb: 3\n", 2, "indent by spaces, not tabs"),
        ("a: @b\n", 1, "not YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' stands twice, first in line 1"),
        ("a:\n  b: 1\n  'b': 2\n", 3, "key 'b' stands twice, first in line 2"),
        ("a: {b: 1, b: 1}\n", 1, "key 'b' stands twice"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", 2, "tags such as 'tag:yaml.org,2002:python/object/apply:os"),
        ("!!map {a: 1}", 1, "tags"),
        ("a: !x 1\n", 1, "tags"),
        ("!!str a: 1\n", 1, "a key must be plain text"),
        ("? [a]\n: 1\n", 1, "a key must be plain text"),
        ('a: 1\n"b\\nc": 2\n', 2, "a key must be plain text, got 'b\\nc'"),
        ("a: 1\n---\nb: 2\n", 2, "a second document starts here"),
        ("a: *b\n", 1, "alias '*b' stands before, or inside, what it names"),
        ("a: &b [1, *b]\n", 1, "alias '*b' stands before, or inside, what it names"),
        ("a: &b 1\nc: &b [*b]\n", 2, "alias '*b' stands before, or inside, what it names"),
        ("a: 1\nb: \0\n", 2, "character U+0000"),
        ("a: 1\nb: \x1b[31m\n", 2, "character U+001B"),
        ('a: 1\nb: "\\0"\n', 2, "character U+0000"),
        ('a: "\\e[31m"\n', 1, "character U+001B"),
        ("a: 1\nb: c\u2028d: 3\n", 2, "character U+2028"),
        ("a: \udcff\n", 1, "character U+DCFF"),
        ("a: 1\nb: 1234567890123456789\n", 2, "a whole number of more than 18 digits"),
        ("a: " + "9" * 5000, 1, "a whole number of more than 18 digits"),
        ("a: -1e999\n", 1, "a number beyond 1.8e308"),
        ("a: " + "[" * (MAX_DEPTH + 1), 1, "nested more than"),
        ("a: " + "[" * (MAX_BYTES // 2), 1, "deep|depth"),
        ("{" * (MAX_BYTES // 2), 1, "depth|a key must be"),
        ("- " * (MAX_BYTES // 2), 1, "nested more than"),
        ("".join(f"k{i}: 1\n" for i in range(MAX_VALUES)), MAX_VALUES, "more than"),
        (": " * 1000, 1, "not YAML"),
        ("%YAML 3.0\n---\na: 1\n", 1, "not YAML"),
        ('"\\ud800": 1', 1, "not YAML|a key must be"),
    ],
)
def test_what_is_no_config_is_refused_with_its_line(loader: None, text: str, line: int, said: str) -> None:
    message = mistake(text)
    assert message.startswith(f"f.yaml:{line}: ")
    assert any(each in message for each in said.split("|")), message


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "\n" * MAX_BYTES])
def test_nothing_is_empty(loader: None, text: str) -> None:
    assert mistake(text) == "f.yaml: empty"


def test_an_escape_beyond_unicode_is_refused(loader: None) -> None:
    assert "not YAML" in mistake('a: "\\UFFFFFFFF"')


def nested(name: str, inner: str, depth: int) -> str:
    return f"{name}: &{name} {'[' * depth}{inner}{']' * depth}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "f.yaml:5: aliases make this more than 10000 values",
        ),
        (
            nested("a", "x", 30) + "".join(nested(b, f"*{a}", 30) for a, b in zip("abcdef", "bcdefg", strict=True)),
            "f.yaml:2: aliases nest this more than 40 deep",
        ),
    ],
)
def test_aliases_multiply_neither_values_nor_depth(loader: None, text: str, said: str) -> None:
    tracemalloc.start()
    try:
        assert mistake(text) == said
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_depth_and_size_up_to_the_limits_are_read(loader: None) -> None:
    document = parse("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, "f")
    assert document.lines[(0,) * MAX_DEPTH] == 1
    assert len(parse("".join(f"k{i}: 1\n" for i in range(MAX_VALUES - 1)), "f").data) == MAX_VALUES - 1
    deep = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert parse(f"[&x {deep}, *x]", "f").data[1] == parse(deep, "f").data


def test_files_are_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + "é: ü\r\nb: 1\r\n".encode())
        document = read(path)
        assert document.data == {"é": "ü", "b": 1}
        assert document.where(("b",)) == f"{path}:2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: é\n".encode("latin-1"), ":2: not UTF-8; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), ":1: not UTF-8"),
        (b"\x80\x81\xff" * 100, ":1: not UTF-8"),
        (b"", ": empty"),
        (b"a: 1\n" * (MAX_BYTES // 5 + 1), ": larger than 256 KiB"),
        (b"\0" * 100, ":1: character U+0000"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{said}")


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="larger than 256 KiB"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it would wait for a writer
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, said in (
        (fifo, "not a regular file"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "a\0b", "null"),
        (loop, "symbolic links"),
        (tmp_path / ("x" * 5000), "File name too long"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(path)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**18) + 1, 10**18 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff")),
    st.sampled_from(
        ["1e3", "1e-3", ".5e3", "0.5e3", "no", "012", "1:30", "1e999", "9" * 30, "~", "", " a ", "a\nb", "#"]
    ),
)
KEYS = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=8)
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(DATA)
def test_what_is_dumped_is_read_back(data: Any) -> None:
    text = dump(data)
    found = parse(text, "f").data
    assert found == data
    assert repr(found) == repr(data)  # 1 is not 1.0 and not True
