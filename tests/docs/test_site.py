"""The site builds without a warning, and its reference has every public name."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "networks",
    "training",
    "policies",
    "evaluation",
    "runtime",
    "engines",
    "serving",
    "portable",
)


@pytest.fixture(scope="module")
def headings(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What one can link to in the reference of the site."""
    site = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    pages = (site / "reference").rglob("index.html")
    return {
        name
        for page in pages
        for name in re.findall(r'id="(impatient\.[\w.]+)"', page.read_text("utf-8"))
    }


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_of_a_room_is_in_the_reference(room: str, headings: set[str]) -> None:
    face = importlib.import_module(f"impatient.{room}")
    public = {name: getattr(face, name) for name in face.__all__}
    documented = [
        name
        for name, value in public.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    ]
    assert documented
    # a name may stand in the room that it comes from
    anchors = {heading.rsplit(".", 1)[1] for heading in headings}
    assert [name for name in documented if name not in anchors] == []
