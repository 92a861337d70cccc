"""A page's shell commands, in order: run as a script it prints the README's that install, a line each."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(page: Path = README) -> list[list[str]]:
    """The lines of each ```bash block."""
    found = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [[line for line in block.splitlines() if line and not line.startswith("#")] for block in found]


if __name__ == "__main__":
    print(*blocks()[0], *blocks()[1], sep="\n")
