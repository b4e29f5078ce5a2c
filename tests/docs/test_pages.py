"""Every code block of README and docs runs as it is written, page by page.

The blocks of a page run in order, in one folder and with one set of names. How-to guides go on
from where the tutorial ends: they find its run directory and its names.

pytest-examples, mktestdocs and sybil run neither commands in this process nor one page after
another, so the loop is our own.
"""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from impatient import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"
# what the tutorial makes and the guides go on with
HANDED_ON = ("impatient", "data", "x", "network", "costs", "recording", "policy")
# generated from the program, or dated notes: nothing in them is meant to be typed
NOT_GUIDES = {DOCS / "cli.md", DOCS / "coverage.md", DOCS / "lab_log.md"}
PAGES = sorted(
    page
    for page in (ROOT / "README.md", *DOCS.rglob("*.md"))
    if page not in NOT_GUIDES and page.parent.name != "decisions"
)
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n\n?)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# more than these would be docs that nobody checks
MOST_NOT_RUN = 8

pytestmark = pytest.mark.filterwarnings("ignore::impatient.errors.NoEffectWarning")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, the line it begins at, and why it is not run, if so."""

    language: str
    code: str
    line: int
    why_not: str | None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield Block(found["language"], found["code"], line, found["why"])


def to_run(page: Path) -> list[Block]:
    return [
        block
        for block in blocks_of(page)
        if block.language in ("python", "sh") and block.why_not is None
    ]


def run_command(words: list[str]) -> None:
    """Run one line of a shell block: `impatient` in this process, for it starts at once here."""
    if words[0] == "impatient":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            # networks of the zoo are unpacked here, not in the home of whoever tests
            patch.setenv("XDG_CACHE_HOME", str(Path.cwd() / "cache"))
            with pytest.raises(SystemExit) as exit:
                cli.main()
        assert not exit.value.code, f"{shlex.join(words)} ended with {exit.value.code}"
    elif words[0] == "cd":
        os.chdir(words[1])
    elif words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True)
    else:
        pytest.fail(f"blocks run impatient, python and cd; given: {shlex.join(words)}")


def run_page(page: Path, folder: Path, names: dict[str, Any]) -> None:
    """Run a page's blocks in a folder; what they define is added to `names`."""
    before = Path.cwd()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        os.chdir(folder)
        for block in to_run(page):
            if block.language == "python":
                # errors then name the page and the line in it
                exec(compile("\n" * block.line + block.code, name_of(page), "exec"), names)
            else:
                for line in block.code.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        run_command(words)
    finally:
        os.chdir(before)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the names that the tutorial ends with."""
    folder = tmp_path_factory.mktemp("tutorial")
    names: dict[str, Any] = {}
    run_page(TUTORIAL, folder, names)
    return folder, {name: names[name] for name in HANDED_ON}


def test_the_tutorial_ends_with_an_answer_from_a_network_that_works(
    tutorial: tuple[Path, dict[str, Any]],
) -> None:
    folder, names = tutorial
    accuracy = names["recording"].quality.mean(1)
    assert accuracy[-1] > 0.8
    assert (folder / "runs/digits/report.html").is_file()


def test_the_readme_runs_by_itself(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    run_page(ROOT / "README.md", tmp_path, names)

    assert names["answer"].output.shape == (1, 10)
    # a newcomer sees a network that works, to the last exit
    assert names["recording"].quality.mean(1)[-1] > 0.8


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in (ROOT / "README.md", TUTORIAL) and to_run(page)],
    ids=name_of,
)
def test_a_page_runs_from_where_the_tutorial_ends(
    page: Path, tutorial: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, names = tutorial
    here = shutil.copytree(folder, tmp_path / "here")
    # a page may train the network further: the next one must not see that
    mine = {name: names[name] for name in HANDED_ON if name != "network"}
    run_page(page, here, {**mine, "network": copy.deepcopy(names["network"])})


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [
        f"{name_of(page)}:{block.line} {block.why_not}"
        for page in PAGES
        for block in blocks_of(page)
        if block.why_not is not None
    ]
    assert len(left_out) <= MOST_NOT_RUN, left_out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_fenced_with_its_language(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {block.language for block in blocks_of(page)} <= {"python", "sh", "text", "json"}
    prose = FENCE.sub("", text)
    # an indented command would be neither highlighted nor run
    assert re.findall(r"^    (?:impatient|python|pip|make) .*", prose, re.MULTILINE) == []
    plain = [block.code for block in blocks_of(page) if block.language == "text"]
    assert not [code for code in plain if re.search(r"^(impatient |import )", code, re.MULTILINE)]


LINKING = sorted(
    {
        *PAGES,
        *DOCS.rglob("*.md"),
        *ROOT.glob("*.md"),
        *(
            page
            for room in ("benchmarks", "examples", "papers")
            for page in (ROOT / room).rglob("*.md")
        ),
    }
)


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_to_files_and_headings_are_right(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert [link for link in local if link and not (page.parent / link).exists()] == []
