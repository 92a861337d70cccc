"""Text from elsewhere, made fit to be shown: names of files and classes can be anything."""

from __future__ import annotations


def shown(text: object) -> str:
    """On one line and printable."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def shortened(text: object, most: int) -> str:
    """As `shown`, of at most that many characters: the middle is left out, as names often differ at their ends."""
    whole = shown(text)
    kept = most // 2
    return whole if len(whole) <= most else f"{whole[: most - kept - 1]}…{whole[-kept:]}"
