"""Tests of the versions and the commit in reports."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import flexmoba
from flexmoba.commands.cli import main
from flexmoba.reporting import versions
from flexmoba.reporting.versions import CHECKOUT, _commit


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["tune", "--example", "--length", "64", "--block-sizes", "16", "--topks", "2"],
    ],
    ids=lambda command: command[0],
)
def test_reports_hold_them(command, capsys):  # other tests check the reports of bench and demo
    assert main([*command, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.items() >= versions().items()
    assert report["flexmoba"] == flexmoba.__version__
    assert report["torch"] == torch.__version__


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_alone(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(folder=tmp_path):
        return _commit.__wrapped__(folder)

    assert commit() is None
    git("init")
    assert commit() is None  # the repository has no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--no-gpg-sign", "-m", "message")
    git("tag", "-a", "v1", "-m", "message")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert commit() == f"{git('rev-parse', 'HEAD')}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None


def test_the_commit_is_that_of_the_package():
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("needs a checkout")
    assert root == CHECKOUT
    assert versions()["commit"] is not None


def test_no_git_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _commit.__wrapped__(tmp_path) is None
