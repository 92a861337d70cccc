"""What is wrong with a config, in words: pydantic's errors as one line for each mistake."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dltrain.registry import most_like, nearest, suggest
from dltrain.yamlfile import Place

NAME = r"^\w[\w.-]{0,99}$"  # a run's name becomes the name of a folder
CUDA = r"^cuda:[0-9]{1,3}$"
PATTERNS = {NAME: "letters, digits, '_', '.' and '-', the first a letter, digit or '_', at most 100", CUDA: "cuda:N"}


def find(error: ValidationError, data: Any) -> dict[Place, list[Any]]:
    """Pydantic's errors for each mistake; several at one place where a value is nothing that a union would take."""
    found: dict[Place, list[Any]] = {}
    for each in error.errors(include_url=False):
        found.setdefault(_place(each, data), []).append(each)
    for place in _misspelt(found):
        found.pop(place, None)
    return found


def _place(error: Any, data: Any) -> Place:
    """Where in the data pydantic's location points, its own names for unions and the like left out."""
    absent = error["type"] in ("missing", "no_name")
    place: list[str | int] = []
    for part in error["loc"][:-1] if absent else error["loc"]:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        elif absent and data == part:  # `- conv`, which needs settings
            data = None
        else:
            continue
        place.append(part)
    return (*place, error["loc"][-1]) if absent else tuple(place)


def _misspelt(found: Mapping[Place, list[Any]]) -> Iterator[Place]:
    """The places of keys that are not missing: an unknown key beside them is meant to be them."""
    missing = [place for place, errors in found.items() if errors[0]["type"] == "missing"]
    unknown = [place for place, errors in found.items() if errors[0]["type"] == "unknown_key"]
    for place in unknown[:20]:  # a config with more has other worries
        beside = [str(other[-1]) for other in missing if other[:-1] == place[:-1]]
        word = str(place[-1])
        meant = most_like(word, found[place][0]["ctx"]["known"]) or most_like(word, beside, cutoff=0)
        if meant in beside:
            yield (*place[:-1], meant)


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "not_settings": "settings (key: value)",
    "not_a_section": "a name, or settings with `name:`",
    "not_an_item": "one {kind}: its name, or name: settings",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "dict_type": "settings (key: value)",
}
_BRANCHES = {"constrained-int": "a whole number of ", "constrained-float": "a number of "}  # pydantic's, of unions


def wrong(errors: list[Any]) -> str:
    """What is wrong at one place, in words."""
    kind, given, facts = errors[0]["type"], errors[0]["input"], errors[0].get("ctx", {})
    known = facts.get("known", [])
    match kind:
        case "missing":
            return "missing"
        case "no_name":
            typo = most_like("name", given, cutoff=0.7)
            return f"missing; is {printable(typo)} meant to be it?" if typo else f"missing{suggest('', known)}"
        case "unknown_key":
            return f"unknown key{suggest(given, known) or '; there are no settings here'}"
        case "unknown_name" if isinstance(given, str):
            return f"unknown {facts['kind']} {short(given)}{suggest(given, known)}"
        case "unknown_name":
            return f"expected the name of one {facts['kind']}, got {short(given)}{suggest('', known)}"
        case "no_settings":
            return f"takes no settings, got {short(given)}"
        case "several_keys":
            keys = ", ".join(map(printable, given[:4]))
            mend = "its settings stand below its name, indented further, or as name: {key: value}"
            return f"expected one {facts['kind']}, got the keys {keys}; {mend}"
    expected, hint = [], suggest("", known)
    for each in errors:
        if each["type"] == "literal_error":
            expected += [word.strip("'") for word in re.split(", | or ", each["ctx"]["expected"])]
            hint = nearest(given, expected) if isinstance(given, str) else hint
        else:
            expected.append(_expected(each))
        if each["type"] == "string_type" and isinstance(given, int | float):
            hint = "; as text, put it in quotes"
    if "a number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    *most, last = dict.fromkeys(expected)
    return f"expected {', '.join(most)}{' or ' if most else ''}{last}, got {short(given)}{hint}"


def _expected(error: Any) -> str:
    """What a value of one type would be."""
    facts = {key: f"{fact:.15g}" if isinstance(fact, float) else fact for key, fact in error.get("ctx", {}).items()}
    if error["type"] == "string_pattern_mismatch" and facts["pattern"] in PATTERNS:
        return PATTERNS[facts["pattern"]]
    if error["type"] not in _EXPECTED:
        return str(error["msg"].removeprefix("Input should be "))
    branch = _BRANCHES.get(error["loc"][-1], "") if error["type"].startswith(("greater", "less")) else ""
    return branch + _EXPECTED[error["type"]].format(**facts)


def key(place: Sequence[str | int]) -> str:
    return ".".join(printable(str(part)) for part in place)


def printable(text: str, most: int = 60) -> str:
    """One line that a terminal shows as it is."""
    shown = text if text and text.isprintable() else repr(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def short(value: Any) -> str:
    """A value for a message, as YAML has it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{'-' * (value < 0)}.{abs(value)!s}"
    return printable(repr(value))
