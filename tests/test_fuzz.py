"""Tests of the fuzzer: a short run, and the report of a failure."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.CHECKS)
def test_random_calls_equal_the_oracle(name):
    assert fuzz.run_round(name, number=0, device="cpu", examples=25) >= 25


def test_a_failure_is_told_with_the_command_that_draws_it_again(monkeypatch, capsys):
    def check(call, device):
        assert call.problem.topk < 4

    monkeypatch.setitem(fuzz.CHECKS, "flex_moba", (fuzz.calls, check))
    command = ["--only", "flex_moba", "--seed", "7", "--seconds", "0", "--examples", "50"]
    assert fuzz.main(command) == 1
    printed = capsys.readouterr().out
    assert "topk=4," in printed  # the smallest failing topk
    assert "python -m tests.fuzz --device cpu --only flex_moba --seed 7 --examples 50" in printed
    assert "rounds that failed: 1" in printed
    assert fuzz.main([*command[:2], "--seed", "7", "--seconds", "0", "--examples", "50"]) == 1
    assert capsys.readouterr().out == printed
