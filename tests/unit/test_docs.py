"""Does what the documents say work: the sample workload, the links, the names of files?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from simkvm.scenario.load import load

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def sample() -> str:
    """The indented block of the README that begins with ``name: mine``."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"(?m)^    name: mine\n(?:    .*\n)+", text)
    assert block is not None
    return "".join(line[4:] for line in block.group().splitlines(keepends=True))


def test_the_sample_of_the_readme_is_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(sample())
    study = load(str(path))
    assert [point.scenario.kernel for point in study.points] == ["linux-6.12", "linux-7.1-lockless"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    made_by_runs = ("results/access-tracking/", "results/trace-unmap/")
    for name in re.findall(
        r"`((?:simkvm|workloads|tests|docs|notebooks)/[\w./-]+)`", document.read_text()
    ):
        if not name.startswith(made_by_runs):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_no_path_of_the_machine_that_wrote_the_page(document: Path) -> None:
    """Generated pages list the commands that they ran; a reader runs them in a checkout."""
    for line in re.findall(r"(?m)^    .*simkvm .*$", document.read_text()):
        assert not re.search(r"(?:^|[\s=])/\w", line), line


def test_no_address_of_a_registry_in_what_git_keeps() -> None:
    kept = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    hosts = re.compile("py" + r"pi\.org|python" + r"hosted\.org|reg" + r"istry\.npm", re.IGNORECASE)
    for name in filter(None, kept):
        path = ROOT / name
        if path.suffix not in {".png", ".parquet"} and path.is_file():
            assert not hosts.search(path.read_text(errors="replace")), name
