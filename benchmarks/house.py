"""Print figures of how code bases are written, side by side.

    python benchmarks/house.py                          # this checkout
    python benchmarks/house.py OLD NEW PATH/httpx       # checkouts, or installed packages

A checkout's package is the folder with modules in `src/`, else the one with `__init__.py` at the
top. Prints a Markdown table. A token is one of Python's own, without comments, line ends and
indentation: a string is one token, whatever its length. Docstrings count neither as tokens nor as
code lines. Import circles are given twice: by what is imported when a module is, and together with
what its functions import later.
"""

from __future__ import annotations

import ast
import io
import math
import re
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDE = 100
MANY_PARAMETERS = 6
Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
# what an isinstance that lists the kinds of policies by hand would ask for
POLICY_KIND = re.compile(r"(Policy|Selection)\b")


@dataclass
class Figures:
    """What was counted in one package."""

    modules: int = 0
    lines: int = 0
    tokens: int = 0
    code_lines: int = 0
    docstring_lines: int = 0
    widths: list[int] = field(default_factory=list)
    format_skips: int = 0
    comments: int = 0
    trailing_comments: int = 0
    parallel_assignments: int = 0
    function_lines: list[int] = field(default_factory=list)
    function_tokens: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    classes: int = 0
    dataclasses: int = 0
    functions: int = 0
    methods: int = 0
    public: int = 0
    documented: int = 0
    getattr_defaults: int = 0
    policy_isinstances: int = 0
    circles: int = 0
    circles_with_deferred: int = 0
    test_lines: int = 0


# --- one module -----------------------------------------------------------------------------------


def docstring_of(node: ast.AST) -> ast.expr | None:
    """Return the expression that is a node's docstring."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return None
    return first.value if isinstance(first.value.value, str) else None


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines that docstrings take."""
    documented = (ast.Module, ast.ClassDef, *Function.__args__)
    found = [docstring_of(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return {line for doc in found if doc for line in range(doc.lineno, (doc.end_lineno or 0) + 1)}


def imported(path: Path, tree: ast.Module, package: Path, *, deferred: bool) -> Iterator[str]:
    """Name what a module imports, with or without what its functions import later."""
    folder = path.relative_to(package.parent).parts[:-1]

    def statements(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, Function) and not deferred:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield node
        for inner in ast.iter_child_nodes(node):
            yield from statements(inner)

    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def read_module(path: Path, figures: Figures) -> ast.Module:
    """Add what one module holds to the figures."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    words = [token for token in tokens if token.type not in LAYOUT]
    documents = docstring_lines(tree)
    figures.modules += 1
    figures.lines += len(lines)
    figures.widths += [len(line) for line in lines if line.strip()]
    figures.tokens += len([word for word in words if word.start[0] not in documents])
    figures.docstring_lines += len(documents)
    figures.code_lines += len(
        {
            line
            for word in words
            for line in range(word.start[0], word.end[0] + 1)
            if line not in documents
        }
    )
    for token in tokens:
        if token.type == tokenize.COMMENT:
            figures.comments += 1
            figures.trailing_comments += bool(token.line[: token.start[1]].strip())
            figures.format_skips += "fmt: skip" in token.string
    read_functions(tree, words, figures)
    read_names(tree, figures)
    read_habits(tree, figures)
    return tree


def read_functions(tree: ast.Module, words: Sequence[tokenize.TokenInfo], figures: Figures) -> None:
    """Count lines, tokens and parameters of every function."""
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        documents = docstring_lines(node)
        inside = [
            word
            for word in words
            if node.lineno <= word.start[0] <= (node.end_lineno or 0)
            and word.start[0] not in documents
        ]
        taken = {line for word in inside for line in range(word.start[0], word.end[0] + 1)}
        figures.function_lines.append(len(taken))
        figures.function_tokens.append(len(inside))
        asked = node.args
        names = [entry.arg for entry in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)]
        figures.parameters.append(len([name for name in names if name not in ("self", "cls")]))


def read_names(tree: ast.Module, figures: Figures) -> None:
    """Count classes, functions, methods, and which public ones say what they are."""

    def visit(nodes: Iterable[ast.stmt], *, in_class: bool) -> None:
        for node in nodes:
            if not isinstance(node, (ast.ClassDef, *Function.__args__)):
                continue
            is_class = isinstance(node, ast.ClassDef)
            if is_class:
                figures.classes += 1
                decorators = [ast.unparse(entry) for entry in node.decorator_list]
                figures.dataclasses += any("dataclass" in entry for entry in decorators)
                visit(node.body, in_class=True)
            elif in_class:
                figures.methods += 1
            else:
                figures.functions += 1
            if not node.name.startswith("_"):
                figures.public += 1
                figures.documented += docstring_of(node) is not None

    visit(tree.body, in_class=False)


def read_habits(tree: ast.Module, figures: Figures) -> None:
    """Count parallel assignments, defaults of getattr and questions for the kind of a policy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = (node.targets[0], node.value)
            figures.parallel_assignments += all(isinstance(side, ast.Tuple) for side in pairs)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            figures.getattr_defaults += node.func.id == "getattr" and len(node.args) == 3
            if node.func.id == "isinstance" and len(node.args) == 2:
                kinds = ast.unparse(node.args[1])
                figures.policy_isinstances += POLICY_KIND.search(kinds) is not None


# --- one package ----------------------------------------------------------------------------------


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Find sets of modules that import each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(members)

    for name in sorted(imports):
        if name not in order:
            visit(name)
    return found


def count_circles(trees: dict[Path, ast.Module], package: Path, *, deferred: bool) -> int:
    """Count the circles among the modules of a package."""
    imports = {}
    for path, tree in trees.items():
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        asked = set(imported(path, tree, package, deferred=deferred))
        imports[name.removesuffix(".__init__")] = asked
    for name, asked in imports.items():
        inside = asked & imports.keys() - {name}
        # `from package.room import member` asks for the member, not for the room's face
        imports[name] = {
            other for other in inside if not any(deep.startswith(f"{other}.") for deep in inside)
        }
    return len(circles(imports))


def is_test(path: Path, root: Path) -> bool:
    """Say whether a file lies in a folder of tests."""
    return not {"test", "tests"}.isdisjoint(path.relative_to(root).parts[:-1])


def package_of(checkout: Path) -> Path:
    """Return the package folder of a checkout or of an installed package."""
    for folder in (checkout / "src", checkout):
        if folder.is_dir():
            inside = sorted(path.parent for path in folder.glob("*/__init__.py"))
            inside = [path for path in inside if path.name not in ("tests", "docs")]
            if inside and not (checkout / "__init__.py").exists():
                return max(inside, key=lambda path: len(list(path.rglob("*.py"))))
    if (checkout / "__init__.py").exists():
        return checkout
    sys.exit(f"{checkout}: no package here; expected a checkout, or a folder with __init__.py.")


def is_hidden(path: Path, checkout: Path) -> bool:
    """Tell whether a folder on the way to a file begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(checkout).parts)


def figures_of(checkout: Path) -> Figures:
    """Count everything in one checkout."""
    package = package_of(checkout)
    figures = Figures()
    paths = [path for path in sorted(package.rglob("*.py")) if not is_test(path, package)]
    trees = {path: read_module(path, figures) for path in paths}
    figures.circles = count_circles(trees, package, deferred=False)
    figures.circles_with_deferred = count_circles(trees, package, deferred=True)
    # a virtual environment inside the checkout is not the project's own code
    own = [path for path in checkout.rglob("*.py") if not is_hidden(path, checkout)]
    tests = [path for path in own if is_test(path, checkout)]
    figures.test_lines = sum(len(path.read_text("utf-8").splitlines()) for path in tests)
    return figures


# --- the table ------------------------------------------------------------------------------------


def percentile(values: Sequence[int], share: float) -> int:
    """Return the smallest value that is at least as large as a share of all."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0


def spread(values: Sequence[int]) -> str:
    """Median, 90th percentile and maximum."""
    median = statistics.median(values) if values else 0
    return f"{median:g} / {percentile(values, 0.9)} / {max(values, default=0)}"


def share(part: int, whole: int) -> str:
    """Format a part of a whole in per cent."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def rows(figures: Figures) -> dict[str, str]:
    """Every figure as it is printed."""
    many = sum(count > MANY_PARAMETERS for count in figures.parameters)
    wide = sum(width > WIDE for width in figures.widths)
    return {
        "modules / lines": f"{figures.modules} / {figures.lines:,}",
        "tokens / code lines": f"{figures.tokens:,} / {figures.code_lines:,}",
        "tokens per code line": f"{figures.tokens / max(1, figures.code_lines):.1f}",
        "line width p90; lines over 100": (
            f"{percentile(figures.widths, 0.9)}; {wide} ({share(wide, len(figures.widths))})"
        ),
        "`# fmt: skip` / parallel assignments": (
            f"{figures.format_skips} / {figures.parallel_assignments}"
        ),
        "function lines median / p90 / max": spread(figures.function_lines),
        "function tokens median / p90 / max": spread(figures.function_tokens),
        "functions over 6 parameters / all; max": (
            f"{many} / {len(figures.parameters)}; {max(figures.parameters, default=0)}"
        ),
        "classes (dataclasses) / functions / methods": (
            f"{figures.classes} ({figures.dataclasses}) / {figures.functions} / {figures.methods}"
        ),
        "public names with a docstring": share(figures.documented, figures.public),
        "docstrings' share of lines": share(figures.docstring_lines, figures.lines),
        "comments per 100 lines; of these behind code": (
            f"{100 * figures.comments / max(1, figures.lines):.1f}; "
            f"{share(figures.trailing_comments, figures.comments)}"
        ),
        "`getattr` with a default": str(figures.getattr_defaults),
        "isinstance on a kind of policy": str(figures.policy_isinstances),
        "import circles; with deferred imports": (
            f"{figures.circles}; {figures.circles_with_deferred}"
        ),
        "lines of tests per line of source": (
            f"{figures.test_lines / figures.lines:.2f}" if figures.test_lines else "-"
        ),
    }


def table(checkouts: Sequence[Path]) -> str:
    """Write a Markdown table, a column for each checkout."""
    columns = [rows(figures_of(checkout)) for checkout in checkouts]
    names = [checkout.resolve().name for checkout in checkouts]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {row} | {' | '.join(column[row] for column in columns)} |" for row in columns[0]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]] or [ROOT]))
