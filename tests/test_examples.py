"""The examples, at toy size: what they say they show is what happens."""

import math
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_bitwise_equal

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
HUGGING_FACE = ("finetune_transformers", "generate")

TINY = ["--layers", "2", "--dim", "32", "--heads", "2", "--kv-heads", "1", "--batch", "4"]
TINY += ["--length", "64", "--block-size", "8", "--topk", "3", "--windows", "4", "--device", "cpu"]


@pytest.fixture
def example(monkeypatch):
    """An example's module, found as when it runs as a script."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        if name in HUGGING_FACE:
            pytest.importorskip("transformers")
        return __import__(name)

    return load


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Random letters, each repeated 16 later: what attention to another block can predict."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(97, 105, (600, 1, 16), generator=generator).expand(-1, 4, -1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(rows.flatten().tolist()))
    return str(path)


def fails(main, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code not in (0, None)
    return capsys.readouterr().err + str(error.value.code)


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches(example, name, capsys):
    with pytest.raises(SystemExit) as error:
        example(name).main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for size in ("toy size", "full size"):
        assert re.search(rf"{size}, .*:\n +python examples/", text), size
    # Every option that a command of the help uses is one of its options.
    usage, _, rest = text.partition("\n\n")
    for command in re.findall(rf"python examples/{name}\.py((?:.*\\\n)*.*)", rest):
        assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", usage))


# ---- train.py -----------------------------------------------------------------------------------


def test_training_resumes_bitwise_and_switches(example, text, tmp_path, capsys):
    main = example("train").main
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    common = ["--text", text, "--steps", "10", "--every", "5", "--full-share", "0.3", *TINY]
    expected = main([*common, "--out", str(whole)])
    assert "step 7: FlexMoba(block_size=8, topk=None) from here on" in capsys.readouterr().out
    half = main([*common, "--out", str(parts), "--until", "5"])
    assert [block.attention.moba.topk for block in half.blocks] == [3, 3]
    resumed = main(["--resume", str(parts), "--device", "cpu"])
    assert [block.attention.moba.topk for block in resumed.blocks] == [None, None]
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(a, b)
    state = torch.load(parts, weights_only=True)
    assert state["schedule"] == {"count": 10}


def test_last_layers_stay_full(example, text, capsys):
    main = example("train").main
    model = main(
        ["--text", text, "--steps", "2", "--attention", "moba", "--full-layers", "1", *TINY]
    )
    assert [block.attention.moba.topk for block in model.blocks] == [3, None]
    first, *rest = loss_rows(capsys.readouterr().out)
    assert first[0] == first[1]  # the first 8 positions are one block
    assert all(moba != full for moba, full in rest)


def loss_rows(printed):
    """Losses of the report by position: as trained, with full attention."""
    rows = re.findall(r"\| +\S+ to \S+(?: \(trailing\))? \| +(\S+) \| +(\S+) \|", printed)
    assert len(rows) == 8
    return [(float(moba), float(full)) for moba, full in rows]


def test_moba_learns_what_only_another_block_tells(example, text, capsys):
    arguments = ["--text", text, "--steps", "250", "--attention", "moba", "--lr", "1e-2", *TINY]
    example("train").main(arguments)
    moba = [row[0] for row in loss_rows(capsys.readouterr().out)]
    assert moba[-1] < 0.8 * math.log(8)  # letters alone, or one block of 8, cannot tell
