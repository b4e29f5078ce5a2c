"""Write docs/cli.md from the command line, or check it with --check."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from impatient.cli import VERBS, parse

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    lines = [
        "# Command line",
        "",
        "Every verb works on one run directory. Made from the program by docs/generate_cli.py.",
    ]
    for verb in VERBS:
        lines += ["", f"## impatient {verb}", "", "```text", help_of(verb), "```"]
    return "\n".join([*lines, ""])


def help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse([verb, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def main() -> None:
    # help is as wide as the terminal says
    os.environ["COLUMNS"] = "100"
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date; run: python docs/generate_cli.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
