"""Write docs/cli.md from the command line itself; with --check, fail if it is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from impatient.cli import app

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Every verb works on one run directory. Made from the program by docs/generate_cli.py.",
        "",
    ]
    for name in root.commands:  # type: ignore[attr-defined]
        command = root.commands[name]  # type: ignore[attr-defined]
        arguments = [
            parameter for parameter in command.params if parameter.param_type_name == "argument"
        ]
        options = [
            parameter for parameter in command.params if parameter.param_type_name == "option"
        ]
        usage = " ".join(
            ["impatient", name, *(argument.metavar or argument.name for argument in arguments)]
        )
        lines += [f"## impatient {name}", "", command.help, "", f"    {usage}", ""]
        if options:
            lines += ["| option | default | meaning |", "|---|---|---|"]
            lines += [
                f"| `{'`, `'.join(o.opts + o.secondary_opts)}` | {_default(o)} | {o.help or ''} |"
                for o in options
            ]
            lines.append("")
    return "\n".join(lines)


def _default(option) -> str:  # type: ignore[no-untyped-def]
    if option.default is None or option.default == "":
        return ""
    return (
        f"`{str(option.default).lower() if isinstance(option.default, bool) else option.default}`"
    )


def main() -> None:
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is out of date; run: python docs/generate_cli.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
