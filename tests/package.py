"""Tests of the results of `make package`, which runs this file: the project page and the wheel."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flexmoba

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel():
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_page_links_to_nothing_that_it_does_not_have(metadata):
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links)
    sentences = re.sub(r"[^\w.]+", " ", re.sub(r"\]\([^)]*\)", "", page))
    for words in ("exact MoBA not exact attention", "Needle example of a tiny model", "python"):
        assert words in sentences


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {x for x in archive.namelist() if ".dist-info/" not in x}
    sources = {x.relative_to(ROOT).as_posix() for x in (ROOT / "flexmoba").rglob("*.py")}
    assert names == sources | {"flexmoba/py.typed"}


def test_the_source_distribution_holds_what_the_readme_links_to():
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {x.partition("/")[2] for x in archive.getnames()}
    links = re.findall(r"\]\((?!https://)([^)\s#]+)", (ROOT / "README.md").read_text())
    assert {"README.md", *links} <= names


def test_classifiers_name_the_versions_that_ci_runs(metadata):
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = re.search(r"python: \[(.+)\]", workflow)[1].replace('"', "").split(", ")
    named = re.findall(r":: Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier")))
    assert named == tested
    assert metadata["Requires-Python"] == f">={tested[0]}"


def test_the_citation_is_of_this_version(metadata):
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert cited == flexmoba.__version__ == metadata["Version"]


def test_the_wheel_alone_runs_the_example_of_the_readme(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path]
    subprocess.run([*pip, wheel], check=True)
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    where = f"import flexmoba; assert flexmoba.__file__.startswith({str(tmp_path)!r})\n"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", where + example], cwd=tmp_path, env=environment, check=True
    )
