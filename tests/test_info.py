"""Tests of ``flexmoba info``."""

import json

import pytest
import torch

from flexmoba import flex_moba
from flexmoba.commands.cli import main


def test_says_what_auto_chooses_and_why(capsys):
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{'torch':<16} {torch.__version__}" in lines
    assert f"{'portable':<16} available <- auto" in lines
    assert f"{'fused':<16} needs inputs on CUDA, got cpu" in lines
    assert f"{'masked':<16} available" in lines


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_its_reasons_are_those_of_the_errors(dtype, capsys):
    assert main(["info", "--device", "cpu", "--dtype", dtype, "--head-dim", "32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inputs"] == f"{dtype}, head dim 32"
    q = torch.zeros(1, 1, 4, 32, dtype=getattr(torch, dtype))
    for impl, reason in report["implementations"].items():
        if reason is None:
            flex_moba(q, q, q, 2, 1, impl=impl)
        else:
            with pytest.raises(NotImplementedError) as error:
                flex_moba(q, q, q, 2, 1, impl=impl)
            assert f'impl="{impl}" {reason}' in str(error.value)


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert main(["info", "--dtype", "bfloat16"]) == 0
    assert f"{'fused':<16} available <- auto" in capsys.readouterr().out.splitlines()


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["nothing"])
    assert error.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
