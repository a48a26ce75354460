"""Tests that run the examples at toy size and check the results that they are to show."""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoba import flex_moba, moba_select
from flexmoba.reference import reference_mask
from flexmoba.tune import Call, gate_quality, tune
from tests.conftest import assert_bitwise_equal

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCS = EXAMPLES.parent / "docs"
MODULES = {"layer_topks", "pretrained"}  # of other examples
NAMES = sorted({path.stem for path in EXAMPLES.glob("*.py")} - MODULES)
HUGGING_FACE = (
    "corpus",
    "finetune_transformers",
    "generate",
    "loss_by_position",
    "model_times",
    "pretrained",
    "retrieval",
    "serving_load",
)
NO_DEVICE = {"corpus", "sweep"}

TINY = ["--layers", "2", "--dim", "32", "--heads", "2", "--kv-heads", "1", "--batch", "4"]
TINY += ["--length", "64", "--block-size", "8", "--topk", "3", "--windows", "4", "--device", "cpu"]


@pytest.fixture
def example(monkeypatch):
    """Returns a function that imports an example, with its folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        if name in HUGGING_FACE:
            pytest.importorskip("transformers")
        return __import__(name)

    return load


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Returns a file of sections of 512 bytes, each of two letters out of 16.

    Only the context determines the two letters.
    """
    generator = torch.Generator().manual_seed(0)
    letters = torch.rand(80, 16, generator=generator).argsort(1)[:, :2]
    which = torch.randint(2, (80, 512), generator=generator)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes((97 + letters.gather(1, which)).flatten().tolist()))
    return str(path)


def fails(main, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code not in (0, None)
    return capsys.readouterr().err + str(error.value.code)


@pytest.mark.parametrize("name", sorted({*NAMES} - NO_DEVICE))
def test_an_unknown_device_is_named(example, name, capsys):
    assert "--device: nothing: unknown device type" in fails(
        example(name).main, ["--device", "nothing"], capsys
    )


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches(example, name, capsys):
    with pytest.raises(SystemExit) as error:
        example(name).main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for size in ("toy size", "full size"):
        assert re.search(rf"{size}, [^:]*:\n +python examples/", text), size
    # The commands in the help use only options of the program.
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
    assert sorted(x.name for x in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]


def test_parts_of_a_step_on_several_processes_are_the_same_step(example, text, tmp_path, capsys):
    """Resumes on two processes with two micro-batches each, and then on one process."""
    main, file = example("train").main, tmp_path / "gpt.pt"
    common = ["--text", text, "--steps", "6", *TINY]
    expected = main([*common])
    main([*common, "--out", str(file), "--until", "2"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    resume = ["--resume", str(file), "--device", "cpu"]
    arguments = [EXAMPLES / "train.py", *resume, "--accumulate", "2", "--until", "4"]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=True)
    assert "step 4: loss " in done.stdout
    assert done.stdout.count("Validation loss") == 1
    resumed = main(resume)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["--fsdp", "--recompute"], marks=pytest.mark.slow),
        pytest.param(
            ["--fsdp", "--fsdp-processes", "1", "--exchange", "heads"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_contexts_spread_over_processes_are_the_same_run(more, example, text, tmp_path):
    """Resumes with each context on two processes, and then on one process."""
    main, file = example("train").main, tmp_path / "gpt.pt"
    common = ["--text", text, "--steps", "8", "--key-conv", "3", "--check-windows", "2", *TINY]
    results, expected_results = tmp_path / "results.json", tmp_path / "expected.json"
    expected = main([*common, "--every", "2", "--results", str(expected_results)])
    main([*common, "--every", "2", "--out", str(file), "--until", "2"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    resume = ["--resume", str(file), "--device", "cpu", "--results", str(results)]
    spread = [EXAMPLES / "train.py", *resume, "--context-parallel", "2", "--until", "6", *more]
    done = subprocess.run([*torchrun, *spread], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Validation loss") == 1
    resumed = main(resume)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    found, one = (json.loads(x.read_text())["history"] for x in (results, expected_results))
    assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
    # Processes validate together. The end of a run has no check.
    ((step, *losses),) = found["checks"]
    assert step == 4
    assert [step, *losses] == pytest.approx(one["checks"][1], rel=1e-5)


@pytest.mark.parametrize(("fsdp", "device"), [(False, "cpu"), (True, "meta")], ids=str)
def test_a_spread_model_is_made_on_its_device(example, text, fsdp, device):
    train = example("train")
    o = train.parse(["--text", text, "--key-conv", "3", *TINY])
    o.fsdp, o.device, o.vocabulary = fsdp, "meta", 256
    model = train.model_of(o)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {device}


def test_an_interrupted_checkpoint_leaves_the_one_before(example, tmp_path, monkeypatch):
    train, file = example("train"), tmp_path / "gpt.pt"
    train.save({"step": 1}, str(file))

    def breaks(state, to):
        Path(to).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        train.save({"step": 2}, str(file))
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_last_layers_stay_full(example, text, capsys):
    main = example("train").main
    model = main(
        ["--text", text, "--steps", "2", "--attention", "moba", "--full-layers", "1", *TINY]
    )
    assert [block.attention.moba.topk for block in model.blocks] == [3, None]
    rows = loss_rows(capsys.readouterr().out)
    assert all(moba == full for moba, full in rows[:3])  # up to 24 keys, topk=3 selects all
    assert any(moba != full for moba, full in rows[3:])


def test_a_file_alone_is_mapped_and_several_are_read(example, tmp_path):
    read = example("train").read
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    for i in range(3):
        (tmp_path / "folder" / f"{i}").write_bytes(bytes([i]) * 40)
    (tmp_path / "whole").write_bytes(bytes([0] * 40 + [1] * 40 + [2] * 40))
    parts = read([str(tmp_path / "folder")], 8)
    whole = read([str(tmp_path / "empty"), str(tmp_path / "whole")], 8)
    assert [len(x) for x in whole] == [108, 12]
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a, b)


def loss_rows(printed):
    """Returns the losses of the report by position, each as trained and with full attention."""
    rows = re.findall(r"\| +\S+ to \S+(?: \(trailing\))? \| +(\S+) \| +(\S+) \|", printed)
    assert len(rows) == 8
    return [(float(moba), float(full)) for moba, full in rows]


def test_moba_learns_from_its_context(example, text, capsys):
    sizes = ["--layers", "1", "--block-size", "16", "--topk", "2"]
    arguments = ["--text", text, "--steps", "100", "--attention", "moba", "--lr", "3e-2"]
    example("train").main([*arguments, *TINY, *sizes])
    moba = [row[0] for row in loss_rows(capsys.readouterr().out)]
    # A uniform guess among the letters has a loss of log(16) = 2.77. Without attention, the model
    # knows only that the last letter is one of the two: (log(2) + log(30)) / 2 = 2.05.
    assert max(moba[2:]) < 1.8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--text", "nowhere"], "there is no nowhere"),
        (["--resume", "nowhere.pt"], "there is no nowhere.pt"),
        (["--out", "nowhere/gpt.pt"], "there is no folder nowhere"),
        (["--resume", __file__], "no checkpoint of this program"),
        (
            ["--batch", "8", "--accumulate", "3"],
            "--batch 8 must be a multiple of 1 processes times",
        ),
        (["--until", "500"], "--until 500 must be at most --steps 400"),
        (["--full-share", "1"], "--full-share must lie between 0 and 1"),
        (["--full-layers", "3"], "--full-layers from 0 to --layers"),
        (["--heads", "5"], "--heads must divide --dim"),
        (["--short-length", "100"], "--short-length 100 must divide --length 512"),
        (["--gate-block-size", "5"], "--gate-block-size 5 must divide --block-size 32"),
        (["--context-parallel", "3"], "--context-parallel 3 must divide --length"),
        (["--context-parallel", "2"], "--context-parallel 2 must divide 1 processes"),
        (["--context-parallel", "2", "--dense", "flash"], "needs --dense flex, not flash"),
        (["--fsdp", "--optimizer", "muon"], "--fsdp needs --optimizer adamw, not muon"),
        (["--fsdp"], "--fsdp needs several processes"),
        (["--fsdp-processes", "2"], "--fsdp-processes needs --fsdp"),
        (["--attention", "nsa", "--full-layers", "1"], "--context-parallel are of MoBA"),
        (["--attention", "nsa", "--block-size", "6"], "--block-size 6 must be a multiple of 4"),
        (["--short-share", "2"], "--short-share 2.0 must lie between 0 and 1"),
        (["--full-while-short"], "--full-while-short needs --attention moba or hybrid, --short"),
        (
            ["--full-while-short", "--short-length", "128", "--short-share", "0.9"],
            "a --short-share that leaves steps to both",
        ),
        (
            ["--full-while-short", "--short-length", "128", "--short-share", "0"],
            "a --short-share that leaves steps to both",
        ),
        (
            ["--full-while-short", "--short-length", "128", "--attention", "full"],
            "--full-while-short needs --attention moba or hybrid",
        ),
        (["--text", __file__, "--length", "10000"], "--length 10000 needs 100,020"),
    ],
)
def test_training_says_what_is_wrong(example, arguments, text, capsys):
    assert text in fails(example("train").main, arguments, capsys)


# ---- corpus.py and train.py on its tokens -------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Of three projects of numbers in words, one held out, another in two files."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("projects")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    generator = torch.Generator().manual_seed(0)
    for name in ("a/x.py", "a/y.md", "rich/z.py", "b/table.txt", "b/copy.py", "b/data.bin"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        drawn = torch.randint(10, (2000,), generator=generator).tolist()
        path.write_text("\n".join(words[i] for i in drawn))
    (root / "b/table.txt").write_text("0.123456789\n" * 100)  # numbers: no text
    (root / "b/copy.py").write_bytes((root / "a/x.py").read_bytes())
    return root


def test_a_corpus_keeps_projects_together(example, corpus, tmp_path, capsys):
    from tokenizers import Tokenizer

    made = ["--roots", str(corpus), "--vocabulary", "300", "--out"]
    about = example("corpus").main([*made, str(tmp_path)])
    assert about["train_projects"].keys() == {"a"}  # b held a copy, and numbers
    assert about["held_out_projects"].keys() == {"rich"}
    tokens = torch.from_file(
        str(tmp_path / "train.bin"), size=about["train_tokens"], dtype=torch.int16
    )
    text = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(tokens.tolist())
    x, y = ((corpus / "a" / name).read_text() for name in ("x.py", "y.md"))
    assert text == f"# a/x.py\n{x}\n\n# a/y.md\n{y}\n\n"
    again = tmp_path / "again"
    example("corpus").main([*made, str(again)])
    for name in ("train.bin", "held_out.bin", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_training_stops_in_time_and_goes_on_bitwise(example, corpus, tmp_path, monkeypatch):
    train = example("train")
    tokens, results = str(tmp_path / "tokens"), tmp_path / "results.json"
    example("corpus").main(["--roots", str(corpus), "--vocabulary", "300", "--out", tokens])
    parts = tmp_path / "parts.pt"
    options = ["--tokens", tokens, "--steps", "30", "--every", "5", "--key-conv", "3", *TINY]
    options += ["--check-windows", "2", "--full-layers", "1", "--sink-blocks", "1"]
    expected = train.main(options)
    times = iter([0.0, *[1.0] * 2, 100.0])  # it begins; steps 5, 10 and 15
    monkeypatch.setattr(train.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(train, "progress", lambda x, _: x)
    train.main([*options, "--minutes", "1", "--out", str(parts), "--results", str(results)])
    stopped = json.loads(results.read_text())
    assert stopped["steps"] == 15
    assert stopped["tokens"] == 15 * 4 * 64
    assert "final" not in stopped
    monkeypatch.undo()
    resumed = train.main(["--resume", str(parts), "--results", str(results), "--device", "cpu"])
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(a, b)
    whole = json.loads(results.read_text())
    assert whole["steps"] == len(whole["history"]["loss"]) == 30
    assert whole["history"]["loss"][:15] == stopped["history"]["loss"]
    assert [step for step, *_ in whole["history"]["checks"]] == [5, 10, 20, 25]
    assert sum(n for _, n, _, _ in whole["history"]["times"]) == 30
    assert whole["step_ms"] > 0
    for kind in ("moba", "full"):
        final = whole["final"][kind]
        assert final["loss"] == pytest.approx(sum(final["by_position"]) / 64, rel=1e-5)
        assert final["last"] == pytest.approx(sum(final["by_position"][-8:]) / 8, rel=1e-5)
        assert list(final["copied"]) == ["0%", "25%", "50%", "75%", "90%"]
    assert whole["final"]["moba"]["loss"] != whole["final"]["full"]["loss"]


def test_a_pretrained_model_goes_on_and_is_saved(example, corpus, tmp_path):
    corpus_of, train = example("corpus"), example("train")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, tokens, again = (str(tmp_path / name) for name in ("llama", "tokens", "again"))
    corpus_of.main(["--roots", str(corpus), "--vocabulary", "300", "--out", tokens])
    PreTrainedTokenizerFast(tokenizer_file=f"{tokens}/tokenizer.json").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    corpus_of.main(["--roots", str(corpus), "--tokenizer", folder, "--out", again])
    assert Path(again, "train.bin").read_bytes() == Path(tokens, "train.bin").read_bytes()

    options = ["--model", folder, "--tokens", again, "--attention", "hybrid", "--steps", "10"]
    options += [*TINY, "--sink-blocks", "1", "--full-layers", "1", "--rope-base", "500.0"]
    options += ["--gate-block-size", "4"]
    save, parts, results = (str(tmp_path / name) for name in ("moba", "parts.pt", "results.json"))
    expected = train.main([*options, "--save", save, "--results", results])
    train.main([*options, "--until", "4", "--out", parts])
    resumed = train.main(["--resume", parts, "--device", "cpu"])
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(a, b)
    losses = json.loads(Path(results).read_text())["history"]["loss"]
    assert losses[-1] < losses[0]

    o = train.parse(["--model", save, "--attention", "full", *options[2:]])
    loaded = train.model_of(o)
    assert o.layers == 3
    assert loaded.model.config.rope_parameters["rope_theta"] == 500.0
    assert loaded.model.config.flexmoba["gate_block_size"] == 4
    inputs = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(1))
    assert_bitwise_equal(loaded(inputs), expected(inputs))  # a hybrid ends with full attention
    with pytest.raises(SystemExit, match="--full-layers 4: the model has 3 layers"):
        train.main([*options, "--full-layers", "4"])


def test_a_model_from_a_gguf_file_can_be_saved(example, tmp_path):
    gguf = pytest.importorskip("gguf")
    dim, vocabulary = 32, 256
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, size in {"embedding_length": dim, "feed_forward_length": dim, "head_count": 2,
                       "head_count_kv": 2, "block_count": 1, "context_length": 64,
                       "layer_norm_rms_eps": 1e-5, "rope_dimension_count": dim // 2,
                       "vocab_size": vocabulary}.items():  # fmt: skip
        getattr(writer, f"add_{name}")(size)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}": (dim, dim) for name in matrices}
    shapes |= {"token_embd": (vocabulary, dim), "output": (vocabulary, dim)}
    shapes |= {"blk.0.attn_norm": (dim,), "blk.0.ffn_norm": (dim,), "output_norm": (dim,)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pretrained = example("pretrained")
    model = pretrained.load(str(tmp_path), "tiny.gguf")
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(vocabulary)[None, :64]
    again = pretrained.load(str(tmp_path / "saved"))
    assert_bitwise_equal(again(tokens).logits, model(tokens).logits)


def test_tokens_beyond_32767_are_read_as_they_were_written(example):
    tokens = torch.tensor([1, 32767, 32768, 65535]).to(torch.int16)  # as on the disk
    inputs, targets = example("train").windows(tokens, torch.tensor([0]), 3, "cpu")
    assert inputs.tolist() == [[1, 32767, 32768]]
    assert targets.tolist() == [[32767, 32768, 65535]]


def test_contexts_of_an_epoch_do_not_overlap(example):
    train = example("train")
    o = train.parse(["--length", "10", "--batch", "3"])
    seen = [x for step in range(6) for x in train.starts_of(step, 100, o).tolist()]
    for epoch in (sorted(seen[:9]), sorted(seen[9:18])):
        assert [b - a for a, b in itertools.pairwise(epoch)] == [10] * 8
        assert epoch[0] >= 0
        assert epoch[-1] + 10 < 100
    assert seen[:9] != seen[9:18]


RECIPE = ["--qk-norm", "--optimizer", "muon", "--to-zero", "--key-conv", "3"]
RECIPE += ["--short-length", "16", "--short-share", "0.5"]


def test_the_recipe_of_the_sweep_resumes_bitwise(example, text, tmp_path, monkeypatch):
    train, parts, results = example("train"), tmp_path / "parts.pt", tmp_path / "results.json"
    lengths = []
    windows = train.windows
    monkeypatch.setattr(
        train, "windows", lambda data, starts, length, device: (
            lengths.append((len(starts), length)) or windows(data, starts, length, device)
        )
    )  # fmt: skip
    common = ["--text", text, "--attention", "moba", "--steps", "10", *TINY, *RECIPE]
    expected = train.main([*common, "--results", str(results)])
    assert lengths[:10] == [(16, 16)] * 5 + [(4, 64)] * 5  # 256 tokens in every step
    # The first reading of either length compiles.
    assert [x[3] for x in json.loads(results.read_text())["history"]["times"]] == [True, True]
    for until in ("3", "7"):
        resume = ["--resume", str(parts), "--device", "cpu"]
        begin = [*common, "--out", str(parts)]
        train.main([*(resume if parts.exists() else begin), "--until", until])
    resumed = train.main(["--resume", str(parts), "--device", "cpu"])
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(a, b)
    assert train.learning_rate(10, train.parse(["--to-zero", "--steps", "10"])) == 0


@pytest.mark.parametrize(
    ("attention", "expected"),
    [("moba", [None] * 5 + [3] * 5), ("hybrid", [None] * 5 + [3] * 3 + [None] * 2)],
)
def test_short_contexts_can_have_full_attention(
    example, text, tmp_path, monkeypatch, attention, expected
):
    train, parts, found = example("train"), tmp_path / "parts.pt", []
    windows = train.windows
    monkeypatch.setattr(
        train, "windows", lambda data, starts, length, device: (
            found.append(length) or windows(data, starts, length, device)
        )
    )  # fmt: skip
    forward, topks = train.GPT.forward, []

    def kept(model, *inputs):
        if model.training and torch.is_grad_enabled():
            layers = [x for x in model.modules() if isinstance(x, train.FlexMoba)]
            topks.append([x.topk for x in layers])
        return forward(model, *inputs)

    monkeypatch.setattr(train.GPT, "forward", kept)
    common = ["--text", text, "--attention", attention, "--full-share", "0.2", "--steps", "10"]
    common += [*TINY, *RECIPE, "--full-while-short", "--full-layers", "1"]
    last = [None]  # of the last layer
    train.main([*common, "--out", str(parts), "--until", "4"])
    train.main(["--resume", str(parts), "--device", "cpu"])
    assert found[:4] == [16] * 4
    assert [x[0] for x in topks] == expected
    assert all(x[1:] == last for x in topks)


NSA = ["--attention", "nsa", "--window", "12", "--sink-blocks", "1", "--local-blocks", "1"]


def test_nsa_trains_and_resumes_bitwise(example, text, tmp_path, capsys):
    train, parts, results = example("train"), tmp_path / "parts.pt", tmp_path / "results.json"
    recipe = [*RECIPE[:4], "--short-length", "16"]
    common = ["--text", text, "--steps", "6", *TINY, *NSA, *recipe, "--results", str(results)]
    expected = train.main(common)
    assert "| NSA, blocks of 8, topk 3, window 12 |" in capsys.readouterr().out
    final = json.loads(results.read_text())["final"]
    assert final.keys() == {"nsa"}
    train.main([*common, "--out", str(parts), "--until", "3"])
    resumed = train.main(["--resume", str(parts), "--device", "cpu"])
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(a, b)
    compress = expected.blocks[0].attention.compress_k
    adam, muon = train.optimizers_of(expected, train.parse([*TINY, *NSA, *recipe]))
    assert any(x is compress.positions for group in adam.param_groups for x in group["params"])
    assert any(x is compress.mlp[0].weight for x in muon.param_groups[0]["params"])
    assert compress.mlp[2].weight.abs().max() > 0
    fresh = train.GPT(argparse.Namespace(**vars(train.parse([*TINY, *NSA])), vocabulary=256))
    assert not fresh.blocks[0].attention.compress_k.mlp[2].weight.any()  # begins as a mean


def test_the_gate_of_a_gpt_scores_sub_blocks(example):
    train, logits = example("train"), []
    tokens = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    for more in ([], ["--gate-block-size", "1"], ["--gate-block-size", "1", "--dense", "cudnn"]):
        o = train.parse([*TINY, *more])
        o.vocabulary = 256
        torch.manual_seed(0)
        model = train.GPT(o)
        train.set_attention(model, topk=3)
        logits.append(model(tokens))
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])


def test_only_gains_of_queries_and_keys_do_not_decay(example):
    train = example("train")
    for more, count in (([], []), (["--qk-norm"], [4])):
        o = train.parse([*TINY, *more])
        o.vocabulary = 256
        (adam,) = train.optimizers_of(train.GPT(o), o)
        kept = [group["params"] for group in adam.param_groups if not group["weight_decay"]]
        assert [len(x) for x in kept if x] == count
        assert all(x.shape == (16,) for some in kept for x in some)
    o = train.parse([*TINY, *RECIPE])
    o.vocabulary = 256
    model = train.GPT(o)
    adam, muon = train.optimizers_of(model, o)
    counts = [sum(len(group["params"]) for group in x.param_groups) for x in (adam, muon)]
    assert counts[1] == 2 * 6  # of each layer: four projections and two of the MLP
    assert sum(counts) == len([*model.parameters()])


@pytest.mark.parametrize("dense", ["flash", "cudnn"])
def test_full_attention_by_torch_is_the_same(example, text, dense, capsys):
    options = ["--text", text, "--steps", "3", "--attention", "hybrid", "--full-share", "0.4"]
    expected = example("train").main([*options, *TINY])
    model = example("train").main([*options, *TINY, "--dense", dense])
    for a, b in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---- sweep.py -----------------------------------------------------------------------------------


def test_a_sweep_stops_goes_on_and_outlives_a_failure(
    example, corpus, tmp_path, monkeypatch, capsys
):
    sweep, work, results = example("sweep"), tmp_path / "work", tmp_path / "sweep.json"
    example("corpus").main(
        ["--roots", str(corpus), "--vocabulary", "300", "--out", str(work / "tokens")]
    )
    monkeypatch.setattr(sweep, "TOY_RUNS", {"wrong": "--topk 0", "8x3": "--attention moba"})
    monkeypatch.setattr(sweep, "TOY_MODEL", " ".join([*TINY, "--every", "10"]))
    monkeypatch.setattr(sweep, "EVALUATION", 200)
    options = ["--toy", "--steps", "40", "--work", str(work), "--results", str(results)]
    first = sweep.main([*options, "--minutes", "0.001", "--least", "-1000"])["runs"]
    assert [x["status"] for x in first.values()] == ["failed", "stopped"]
    assert "--topk: must be at least 1" in first["wrong"]["error"]
    assert 10 <= first["8x3"]["steps"] < 40
    script = tmp_path / "first.sh"
    script.write_text("echo $1 > $2")
    more = ["--first", str(script), "done", str(tmp_path / "said")]
    second = sweep.main([*options, *more])["runs"]
    assert (tmp_path / "said").read_text() == "done\n"
    assert [x["status"] for x in second.values()] == ["failed", "done"]
    losses = [x["8x3"]["history"]["loss_of_10_steps"] for x in (first, second)]
    assert losses[1][: len(losses[0])] == losses[0]
    assert len(losses[1]) == 4
    seconds = second["8x3"]["history"]["seconds"]
    assert seconds == sorted(seconds)
    assert second["8x3"]["options"].keys() >= {"block_size", "seed", "sink_blocks"}
    assert str(tmp_path) not in results.read_text()
    printed = capsys.readouterr().out
    assert re.search(r"\| +8x3 \| +\d\.\d{4} \|", printed)
    # With those results at hand, nothing runs again.
    third = sweep.main([*options, "--work", str(tmp_path / "new"), "--have", str(results),
                        "--only", "8x3"])  # fmt: skip
    assert third["runs"]["8x3"] == second["8x3"]


def test_a_sweep_continues_the_training_of_a_pretrained_model(example, tmp_path, monkeypatch):
    sweep, train, started = example("sweep"), example("train"), []

    class Ended:
        returncode = 1

        def poll(self):
            return 1

    def start(self, arguments, gpu, log):
        started.append([Path(arguments[0]).name, *arguments[1:]])
        (self.log / f"{log}.log").touch()
        if log == "corpus":
            self.o.tokens.mkdir()
            (self.o.tokens / "corpus.json").write_text("{}")
        return Ended()

    monkeypatch.setattr(sweep.Sweep, "start", start)
    monkeypatch.setattr(sweep, "gpus", lambda: ["0", "1"])
    work = ["--work", str(tmp_path), "--results", str(tmp_path / "sweep.json")]
    found = sweep.main(["--model", str(EXAMPLES), "--gguf", "x.gguf", *work])
    assert found["runs"].keys() == sweep.PRETRAINED_RUNS.keys()
    assert started[0][:1] + started[0][-4:] == [
        *("corpus.py", "--tokenizer", str(EXAMPLES), "--gguf", "x.gguf")
    ]
    for (program, *arguments), name in zip(started[1:], sweep.PRETRAINED_RUNS, strict=True):
        o = train.parse(arguments)
        assert program == "train.py"
        length, steps = (32768, 200) if "32K" in name else (8192, 400)
        steps = {"64x16 sink 32K longer": 470, "64x16 sink sub8 32K": 330}.get(name, steps)
        assert (o.model, o.gguf, o.length, o.steps) == (str(EXAMPLES), "x.gguf", length, steps)
        assert (o.sink_blocks > 0) == ("sink" in name or name.startswith("full"))
        part = re.search(r"sub(\d)", name)
        assert o.gate_block_size == (int(part[1]) if part else None)
        sizes = re.search(r"(\d+)x(\d+)", name)
        assert (o.block_size, o.topk) == ((int(sizes[1]), int(sizes[2])) if sizes else (64, 16))
        assert o.save == str(tmp_path / "models" / name.replace(" ", "-"))


def test_a_smoke_test_tries_each_configuration(example, tmp_path, monkeypatch):
    sweep = example("sweep")
    monkeypatch.setattr(sweep, "TOY_RUNS", {"full": "--attention full", "wrong": "--topk 0"})
    monkeypatch.setattr(sweep, "TOY_MODEL", " ".join(TINY))
    sweep.random_tokens(tmp_path / "random", 300)
    (tmp_path / "smoke").mkdir()
    work = ["--dense", "flash", "--work", str(tmp_path)]
    sweep.main(["--toy", "--do-smoke", "--only", "wrong", "full", *work])
    found = {x.stem: json.loads(x.read_text()) for x in (tmp_path / "smoke").glob("*.done")}
    assert found["full"]["tokens_per_second"] > 0
    assert "SystemExit" in found["wrong"]["error"]
    about = json.loads((tmp_path / "smoke" / "full.json").read_text())
    assert about["options"]["dense"] == "flash"


# ---- retrieval.py -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A folder with a tiny Llama, whose tokens are bytes."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("letters"))
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["single", "multi-key", "multi-value", "tracking", "counting"])
def test_a_context_holds_what_is_asked(example, task):
    retrieval = example("retrieval")
    text = "\n".join(f"line {i} of the text" for i in range(300))
    contexts = retrieval.Contexts(None, text)
    for seed, depth in enumerate((0.0, 0.5, 1.0)):
        ids, n = contexts.draw(task, 2000, depth, retrieval.random.Random(seed))
        assert 1900 < len(ids) <= 2000
        before, answer = (bytes(x.tolist()).decode() for x in (ids[:-n], ids[-n:]))
        found = [before.find(f" {x}") for x in re.findall(r"\w+", answer)]
        if task == "counting":
            words = re.findall(r"\w+", before.split(":")[1].split("\n")[0])
            assert words.count(answer.strip()) == max(map(words.count, words)) == len(words) // 10
            assert len({*words} - {answer.strip()}) > 20
            continue
        assert min(found) >= 0
        if task == "tracking":
            chain = re.findall(r"VAR (\w+) = (\w+)", before)
            value = re.search(r"the value (\d+),", before)[1]
            assert [y for _, y in chain] == [value, *(x for x, _ in chain[:-1])]
            assert answer == f" {', '.join(x for x, _ in chain)}"
        elif task == "multi-value":
            word = re.search(r"numbers of (\w+), in", before)[1]
            told = re.findall(rf"number of {word} is (\d+)\.", before)
            assert answer == f" {', '.join(told)}"
        else:
            assert found[0] == pytest.approx(depth * len(before), abs=150)
            word = re.search(r"number of (\w+) is$", before)[1]
            told = dict(re.findall(r"number of (\w+) is (\d+)\.", before))
            assert answer == f" {told[word]}"
            assert len(told) == (8 if task == "multi-key" else 1)


def test_answers_are_right_if_every_token_is(example, letters):
    retrieval, pretrained = example("retrieval"), example("pretrained")
    model = pretrained.load(letters).eval()
    ids = torch.arange(40)
    for _ in range(3):  # continued greedily
        ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
    assert retrieval.is_right(model, ids, 3)
    for i in (-3, -2, -1):
        wrong = ids.clone()
        wrong[i] = (wrong[i] + 1) % 256
        assert not retrieval.is_right(model, wrong, 3)


def test_full_decoding_reads_the_context_with_moba(example, letters):
    retrieval, pretrained = example("retrieval"), example("pretrained")
    from flexmoba.hybrid import set_attention

    model = pretrained.load(letters).eval()
    torch.manual_seed(0)
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.5)  # so that the attention decides the next token
    ids = torch.randint(256, (300,))
    retrieval.convert(model, **retrieval.options_of("8x3+sink+sub4+full-decode"))
    settings = {"block_size": 8, "topk": 3, "sink_blocks": 1, "gate_block_size": 4}
    assert model.config.flexmoba.items() >= settings.items()
    read = model(input_ids=ids[None])
    set_attention(model, topk=None)
    logits = read.logits
    for _ in range(8):  # greedily
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
        logits = model(input_ids=ids[None, -1:], past_key_values=read.past_key_values).logits
    set_attention(model, topk=3)
    assert retrieval.is_right(model, ids, 8, full_decode=True)
    assert not retrieval.is_right(model, ids, 8)
    wrong = torch.cat([ids[:-1], (ids[-1:] + 1) % 256])
    assert not retrieval.is_right(model, wrong, 8, full_decode=True)


def test_attentions_answer_the_same_questions(example, letters, tmp_path, capsys):
    main, file = example("retrieval").main, tmp_path / "retrieval.json"
    options = ["--tasks", "single", "counting", "--lengths", "512", "600", "--samples", "5"]
    report = main(["--model", letters, *options, "--attention", "full", "8x3", "8x3+sink",
                   "8x75", "8x75+sink+sub4", "--device", "cpu", "--json", str(file)])  # fmt: skip
    assert json.loads(file.read_text())["right"] == report["right"]
    right = report["right"]
    assert right["8x75"] == right["8x75+sink+sub4"] == right["full"]  # all blocks are selected
    assert right.keys() == {"full", "8x3", "8x3+sink", "8x75", "8x75+sink+sub4"}
    assert all(
        len(right["full"][x][y]) == 5 for x in ("single", "counting") for y in ("512", "600")
    )
    assert "By depth, of all lengths" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--text", "nowhere"], "there is no nowhere"),
        (["--model", "nowhere"], "there is no such folder; nothing is downloaded"),
        (["--model", str(EXAMPLES)], "transformers cannot load it"),
        (["--attention", "64"], "--attention 64: say full, or for example 64x16, 64x16+sink or "),
        (["--lengths", "100"], "--lengths 100: the longest question needs 512 tokens"),
    ],
)
def test_retrieval_says_what_is_wrong(example, arguments, text, capsys):
    arguments = ["--model", str(EXAMPLES), *arguments]
    assert text in fails(example("retrieval").main, arguments, capsys)


# ---- tune.py ------------------------------------------------------------------------------------


def test_tuning_applies_what_it_recommends(example, text, tmp_path, capsys):
    checkpoint, picture = str(tmp_path / "gpt.pt"), tmp_path / "tune.png"
    full = ["--attention", "full", "--steps", "2", "--out", checkpoint]
    example("train").main(["--text", text, *full, *TINY])
    grid = ["--block-sizes", "8", "16", "--topks", "1", "3", "--mass", "0.5", "--no-times"]
    report, losses = example("tune").main(
        [checkpoint, *grid, "--windows", "4", "--device", "cpu", "--plot", str(picture)]
    )
    best = report.recommend(mass=0.5)
    printed = capsys.readouterr().out
    assert f"now FlexMoba(block_size={best.block_size}, topk={best.topk})" in printed
    assert " <- |" in printed
    assert picture.stat().st_size > 10_000
    full, recommended, fewest = losses.values()
    assert len({full, recommended, fewest}) == 3  # each selection differs
    assert (best.block_size, best.topk) != (8, 1)


def test_tuning_needs_a_checkpoint(example, capsys):
    main = example("tune").main
    assert "train.py --attention full --out nowhere.pt makes it" in fails(
        main, ["nowhere.pt"], capsys
    )
    assert "is not a checkpoint of train.py" in fails(main, [__file__], capsys)


def test_text_that_has_gone_is_named(example, text, tmp_path, capsys):
    checkpoint, moved = str(tmp_path / "gpt.pt"), tmp_path / "moved.txt"
    moved.write_bytes(Path(text).read_bytes())
    full = ["--attention", "full", "--steps", "1", "--out", checkpoint]
    example("train").main(["--text", str(moved), *full, *TINY])
    moved.unlink()
    for name, arguments in (("tune", [checkpoint]), ("train", ["--resume", checkpoint])):
        main = example(name).main
        assert f"--text: there is no {moved}" in fails(
            main, [*arguments, "--device", "cpu"], capsys
        )


# ---- needle.py ----------------------------------------------------------------------------------


def test_contexts_hold_the_answer_at_its_depth(example):
    needle, generator = example("needle"), torch.Generator().manual_seed(0)
    for depth, position in ((0.0, 0), (0.5, 60), (1.0, 122)):
        tokens, answers = needle.contexts(5, 128, 3, generator, depth)
        asked, body = tokens[:, -3:] - needle.ASK, tokens[:, :-3]
        for row in range(5):
            for question, answer in zip(asked[row], answers[row], strict=True):
                at = (body[row] == question).nonzero().item()  # once, directly before the value
                assert body[row, at + 1] == needle.VALUE + answer
            assert body[row, position] == asked[row, 0]
        is_value = (body >= needle.VALUE) & (body < needle.ASK)
        assert (is_value.sum(1) == needle.NEEDLES).all()  # all others are fillers


def test_full_attention_finds_every_needle(example):
    main = example("needle").main
    found = main(["--variants", "full", "--lengths", "64", "--tests", "64", "--device", "cpu"])
    assert min(found["full"][64]) > 0.9


def moba_densely(q, k, v, block_size, topk, **options):
    """Computes flex_moba densely, which is faster in contexts shorter than a tile of 128."""
    sub_blocks = options.pop("gate_block_size", None)
    assert not any(options.values())
    if topk is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    selection = moba_select(q, k, block_size, topk, gate_block_size=sub_blocks).long()
    selection = selection.where(selection >= 0, selection[..., :1])  # replaces -1 by the own block
    blocks = torch.nn.functional.one_hot(selection, -(-k.shape[2] // block_size)).amax(-2) > 0
    mask = reference_mask(blocks, block_size, k.shape[2], is_causal=True)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.slow
def test_sub_blocks_and_a_key_convolution_let_the_gate_find_needles(example, monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 60, 16)
    for part in (None, 2):
        out = flex_moba(q, k, v, 8, 3, gate_block_size=part)
        torch.testing.assert_close(moba_densely(q, k, v, 8, 3, gate_block_size=part), out)
    monkeypatch.setattr("flexmoba.nn.flex_moba.flex_moba", moba_densely)
    main, options = example("needle").main, ["--lengths", "64", "--device", "cpu"]
    sparse = ["moba", "moba+conv+sub"]
    found = main(["--variants", *sparse, *options])
    moba, both = (sum(found[name][64]) / 5 for name in sparse)
    assert both > 0.95
    (scratch,) = main(["--variants", "moba", "--full-share", "0", *options])["moba"].values()
    assert 2 / 8 < sum(scratch) / 5 < moba < both  # above chance


def test_moba_follows_full_attention_in_training(example, monkeypatch):
    needle, topks = example("needle"), []
    forward = needle.Model.forward

    def recorded(model, tokens):
        if model.training:
            topks.append([x.moba.current_topk for x in model.attention])
        return forward(model, tokens)

    monkeypatch.setattr(needle.Model, "forward", recorded)
    options = ["--steps", "5", "--batch", "1", "--tests", "1", "--lengths", "24", "--device", "cpu"]
    needle.main(["--variants", "full", "moba", *options])
    assert topks == [[None, None]] * (5 + 3) + [[3, 3]] * 2


# ---- finetune_transformers.py -------------------------------------------------------------------

SHORT = ["--length", "64", "--windows", "4", "--batch", "4", "--device", "cpu"]


def test_conversion_loses_what_fine_tuning_brings_back(example, text, tmp_path):
    main = example("finetune_transformers").main
    steps = ["--pretrain-steps", "30", "--steps", "20"]
    found = main(["--text", text, "--block-size", "16", "--topk", "2", *steps, *SHORT,
                  "--save", str(tmp_path)])  # fmt: skip
    assert found["converted"] != found["dense"]
    assert found["finetuned"] < found["converted"]
    assert found["loaded"] == found["finetuned"] != found["finetuned, dense"]
    # The saved model loads like any other. With topk=4, all blocks, it computes full attention.
    again = main(["--model", str(tmp_path), "--text", text, "--topk", "4", "--steps", "1", *SHORT])
    assert again["dense"] == pytest.approx(found["finetuned, dense"], rel=1e-5)
    assert again["converted"] == pytest.approx(again["dense"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--text", "nowhere"], "there is no nowhere"),
        (["--topk", "1"], "--topk must be at least 2"),
        (["--model", "nowhere"], "there is no such folder; nothing is downloaded"),
        (["--save", __file__], f"--save {__file__}: no such folder can be made (File exists)"),
        (["--full-layers", "3"], "--full-layers 3 must lie from 0 to the model's 2 layers"),
        (["--text", __file__, "--length", "10000"], "--length 10000 needs 100,000"),
    ],
)
def test_fine_tuning_says_what_is_wrong(example, arguments, text, capsys):
    assert text in fails(example("finetune_transformers").main, arguments, capsys)


# ---- loss_by_position.py ------------------------------------------------------------------------


def test_settings_are_measured_beside_full_attention(example, text, tmp_path, capsys):
    main, file = example("loss_by_position").main, tmp_path / "loss.json"
    options = ["--text", text, "--length", "128", "--windows", "2", "--pretrain-steps", "2"]
    report = main([*options, "--most", "4", "--json", str(file), "--device", "cpu"])
    assert json.loads(file.read_text()) == report
    names = [x["name"] for x in report["settings"]]
    assert names == [
        "full attention",
        "1 x 32, sink 1, local 1",
        "1 x 32",
        "2 x 16, sink 1, local 1",
    ]
    losses = [x["texts"]["text"]["loss"] for x in report["settings"]]
    assert len(set(losses)) == 4
    assert "| 1 x 32, sink 1, local 1 |" in capsys.readouterr().out
    for x in report["settings"]:
        found = x["texts"]["text"]
        assert len(found["by_window"]) == 2
        assert sum(found["by_window"]) / 2 == pytest.approx(found["loss"], rel=1e-5)


def test_only_the_named_settings_are_measured(example, text):
    options = ["--text", text, "--length", "128", "--windows", "1", "--pretrain-steps", "1"]
    main = example("loss_by_position").main
    report = main([*options, "--only", "sub-blocks", "16 x 2,", "--device", "cpu"])
    names = [x["name"] for x in report["settings"]]
    assert names[0] == "full attention"
    assert len(names) > 1
    assert all("sub-blocks" in name or "16 x 2," in name for name in names[1:])


def test_settings_by_layer_are_measured_beside_one_topk(example, text, tmp_path, monkeypatch):
    grid, file = example("loss_by_position"), tmp_path / "loss.json"
    unseen, applied, convert = [], [], grid.convert
    calls_of = grid.calls_of
    monkeypatch.setattr(grid, "calls_of", lambda *x: unseen.append(x[1]["text"]) or calls_of(*x))
    monkeypatch.setattr(
        grid, "convert", lambda *x, **y: applied.append((*x[1:], y)) or convert(*x, **y)
    )
    # The layers of this model are too much alike to get different topks.
    monkeypatch.setattr(grid, "best_topks", lambda _, budget: [budget // 4, budget * 3 // 4])
    options = ["--text", text, "--length", "128", "--windows", "2", "--pretrain-steps", "2"]
    options += ["--by-layer", "8x4", "8x4+sub4", "--json", str(file), "--device", "cpu"]
    report = grid.main(options)
    assert json.loads(file.read_text()) == report
    names = ["8 x 4, sink 1", "8 x 4, sink 1, sub-blocks of 4"]
    expected = ["full attention", *(y for x in names for y in (x, f"{x}, by layer"))]
    assert [x["name"] for x in report["settings"]] == expected
    _, one, by_layer, *_ = report["settings"]
    assert by_layer["setting"] == one["setting"] | {"by_layer": [2, 6]}
    assert [x[1] for x in applied] == [[4, 4], [2, 6]] * 2
    assert all(x[2]["sink_blocks"] == 1 for x in applied)
    losses = [x["texts"]["text"]["loss"] for x in report["settings"]]
    assert len(set(losses)) == 5
    masses = [x["mass"] for x in report["settings"][1:]]
    assert all(0 < x < 1 for x in masses)
    assert len(set(masses)) == 4
    # The context for the choice is none of those that are measured.
    tokens = torch.tensor(list(Path(text).read_bytes()))
    (context,) = unseen
    start = (len(tokens) - 128) // 2
    assert context.tolist() == tokens[start : start + 128].tolist()


@st.composite
def masses_by_layer(draw):
    """Draws up to four measured topks and their masses, in thousandths, in up to four layers."""
    topks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
    mass = st.integers(0, 3) | st.integers(0, 1000)
    layer = st.tuples(*(mass for _ in topks)).map(lambda x: dict(zip(topks, x, strict=True)))
    return draw(st.lists(layer, min_size=1, max_size=4))


@pytest.fixture(scope="module")
def layer_topks():
    """Returns the module of that name, which has no state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return __import__("layer_topks")


@given(masses_by_layer(), st.data())
def test_topks_by_layer_are_the_best_of_all(layer_topks, masses, data):
    def value(topks):  # mass, then few blocks, then similar topks
        mass = sum(layer[topk] for layer, topk in zip(masses, topks, strict=True))
        return mass, -sum(topks), -sum(x**2 for x in topks)

    layers = [{x: y / 1000 for x, y in layer.items()} for layer in masses]
    budget = len(layers) * data.draw(st.integers(min(masses[0]), 10))
    found = layer_topks.best_topks(layers, budget)
    allowed = [x for x in itertools.product(*masses) if sum(x) <= budget]
    assert tuple(found) in allowed
    assert value(found) == max(map(value, allowed))
    mean = value(found)[0] / 1000 / len(masses)
    assert layer_topks.mean_mass(layers, found) == pytest.approx(mean)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6, unique=True), st.integers(1, 5))
def test_layers_that_are_alike_get_the_same_topk(layer_topks, topks, layers):
    for concave in (lambda x: x / 20, lambda x: 1 - 0.9**x):
        for topk in topks:
            same = [{x: concave(x) for x in topks}] * layers
            assert layer_topks.best_topks(same, topk * layers) == [topk] * layers


def test_a_layer_that_needs_no_more_blocks_leaves_them_to_others(layer_topks):
    flat, steep = dict.fromkeys((2, 4, 6), 0.9), {2: 0.2, 4: 0.5, 6: 0.6}
    masses = [flat, steep, flat]
    assert layer_topks.best_topks(masses, 12) == [2, 6, 2]
    assert layer_topks.mean_mass(masses, [2, 6, 2]) == pytest.approx(0.8)
    assert layer_topks.best_topks(masses, 9) == [2, 4, 2]  # 3 was not measured
    assert layer_topks.best_topks(masses, 6) == [2, 2, 2]


def test_masses_by_layer_are_those_of_the_gate_and_the_heads(layer_topks):
    calls = [Call(name, *torch.randn(2, 1, 2, 64, 8), torch.arange(64), 1.0) for name in "ab"]
    report = tune(calls, (8,), (2, 3), gate_block_sizes=(4,), sink_blocks=1, timed=False)
    for part in (None, 4):
        gate = {"gate_block_size": part, "sink_blocks": 1, "scale": 1.0}
        found = layer_topks.masses_of(report, part)
        for call, layer in zip(calls, found, strict=True):
            mass = gate_quality(call.q, call.k, 8, (2, 3), **gate)[8].mass.mean(1)
            assert layer == pytest.approx(dict(zip((2, 3), mass.tolist(), strict=True)))


def test_every_setting_of_the_grid_serves(example):
    grid = example("loss_by_position")
    model = grid.tiny_llama().eval()
    tokens = torch.randint(256, (1, 128), generator=torch.Generator().manual_seed(0))
    settings = grid.settings_of(128, 2)
    grid.apply(model, {"block_size": 8, "topk": 2})
    assert model.config.flexmoba["sink_blocks"] == 0  # unlike the default of `convert`
    assert {"gate", "gate_block_size", "first_full", "sink_blocks", "local_blocks"} <= {
        y for x in settings for y in x
    }
    with torch.no_grad():
        for setting in settings[1:]:
            grid.apply(model, setting)
            assert model(tokens).logits.isfinite().all(), grid.name_of(setting)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--text", "nowhere"], "there is no nowhere"),
        (["--model", "nowhere"], "there is no such folder; nothing is downloaded"),
        (["--model", str(EXAMPLES)], "transformers cannot load it"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["--by-layer", "64", "64x16"], "--by-layer 64: it must be like 64x16 or 64x16+sub4"),
        (["--by-layer", "16x1", "--pretrain-steps", "1"], "topk must be at least 2 and below the"),
        (
            ["--text", __file__, "--length", "9000", "--by-layer", "16x4", "--pretrain-steps", "1"],
            "--by-layer needs 135,000 for a context of 9000 tokens between 8 others",
        ),
    ],
)
def test_loss_by_position_says_what_is_wrong(example, arguments, text, capsys):
    assert text in fails(example("loss_by_position").main, arguments, capsys)


# ---- model_times.py -----------------------------------------------------------------------------

TIMES = ["--lengths", "64", "--device", "cpu", "--decoder-lengths"]


def test_calls_and_a_decoder_are_timed(example, tmp_path, capsys):
    main, file = example("model_times").main, tmp_path / "times.json"
    sizes = ["--layers", "1", "--vocabulary", "64", "--json", str(file)]
    with torch._dynamo.config.patch(recompile_limit=8):  # the example raises it
        report = main(["--attention", "16x2+sink+sub4", *sizes, *TIMES, "96"])
    assert json.loads(file.read_text()) == report
    assert list(report["ms"]) == ["call 64 16x2+sink+sub4", "decoder 96 16x2+sink+sub4"]
    (forward, both), decoder = report["ms"].values()
    assert 0 < forward < both
    assert decoder > 0
    assert {"flexmoba", "commit", "torch", "transformers"} <= report["versions"].keys()
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert [x.strip() for x in head.split("|")[1:-1]] == ["attention", "call, 64", "decoder, 96"]
    cells = ["16x2+sink+sub4", f"{forward:.2f} / {both:.2f}", f"{decoder:.1f}"]
    assert [x.strip() for x in row.split("|")[1:-1]] == cells


def test_calls_are_timed_without_a_decoder(example):
    report = example("model_times").main(["--attention", "full", "flash", "16x2", *TIMES])
    assert list(report["ms"]) == ["call 64 full", "call 64 flash", "call 64 16x2"]


def test_names_of_attentions_are_options(example):
    options_of = example("retrieval").options_of
    assert options_of("full")["topk"] is None
    moba = {"block_size": 64, "topk": 16}
    assert options_of("64x16") == moba | {"sink_blocks": 0}
    assert options_of("64x16+sink+full-decode") == moba | {"sink_blocks": 1}
    sub_blocks = {"sink_blocks": 1, "gate_block_size": 8}
    assert options_of("64x16+sink+sub8") == moba | sub_blocks
    q, k, v = torch.randn(3, 1, 2, 512, 16).unbind()
    call = example("model_times").call_of("64x3+sink+sub8")
    expected = flex_moba(q, k, v, block_size=64, topk=3, **sub_blocks)
    assert_bitwise_equal(call(q, k, v), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--attention", "full", "64"], "--attention 64: say full, cudnn, flash, or for"),
        (["--attention", "64x16+full-decode"], "--attention 64x16+full-decode: say full"),
        (["--heads", "3"], "--kv-heads 2 must divide --heads 3"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_model_times_says_what_is_wrong(example, arguments, text, capsys):
    assert text in fails(example("model_times").main, arguments, capsys)


# ---- generate.py --------------------------------------------------------------------------------

GENERATE = ["--new-tokens", "8", "--block-size", "16", "--device", "cpu"]


@pytest.mark.parametrize("static", ["--static", "--no-static"])
def test_the_sparse_cache_changes_no_token(example, static, capsys):
    main = example("generate").main
    tokens = main(["--prompt-tokens", "200", "--topk", "2", static, *GENERATE])
    assert torch.equal(tokens["MoBA"], tokens["MoBA, sparse"])
    assert not torch.equal(tokens["dense"], tokens["MoBA"])
    printed = capsys.readouterr().out
    assert "MoBA with both caches generated the same 8 of 8 tokens" in printed
    # A step of full attention reads 201 to 207 keys. A step of MoBA reads one block of 16 and 9 to
    # 15 keys of the own block, and for the gate 12 mean keys or, without them, all keys.
    reads = re.findall(r"\| +([\d,]+) \|$", printed, re.M)
    assert reads == ["204", str(204 + 16 + 12), str(12 + 16 + 12)]
    tokens = main(["--prompt-tokens", "200", "--topk", "14", static, *GENERATE])
    assert torch.equal(tokens["dense"], tokens["MoBA, sparse"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere"], "there is no such folder; nothing is downloaded"),
        (["--model", str(EXAMPLES)], "transformers cannot load it"),
        (["--prompt", "nowhere.txt"], "there is no such file"),
        (["--prompt", __file__, "--prompt-tokens", "99999"], "fewer than --prompt-tokens"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
    ],
)
def test_generation_says_what_is_wrong(example, arguments, text, capsys):
    assert text in fails(example("generate").main, arguments, capsys)


# ---- Several processes --------------------------------------------------------------------------

SPREAD = ["--length", "200", "--steps", "20", "--every", "10", "--check", "--device", "cpu"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("exchange", "launcher"), [("gather", "torchrun"), ("heads", "spawn")])
def test_contexts_spread_over_processes_train_as_in_one(exchange, launcher):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(EXAMPLES / "context_parallel.py"), "--exchange", exchange, *SPREAD]
    if launcher == "spawn":
        torchrun, program = [], [*program, "--processes", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, *program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    differences = re.search(r"process: loss ([\d.e+-]+), gradients ([\d.e+-]+) of", done.stdout)
    assert max(map(float, differences.groups())) < 1e-4  # in float32
    steps = re.findall(r"^step (\d+): loss ([\d.]+), \d+% right$", done.stdout, re.M)
    assert [step for step, _ in steps] == ["10", "20"]
    assert float(steps[1][1]) < float(steps[0][1])


def test_scaling_measures_both_exchanges(tmp_path):
    sizes = ["--length", "256", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
    sizes += ["--block-size", "16", "--topk", "3", "--repeats", "1", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    file = tmp_path / "scaling.json"
    program = [str(EXAMPLES / "scaling.py"), *sizes, "--json", str(file)]
    done = subprocess.run(
        [sys.executable, *torchrun, *program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    cases = [(x["ranks"], x["length"], x["exchange"]) for x in results]
    assert cases == [(1, 256, "none"), (1, 128, "none"), (2, 256, "gather"), (2, 256, "heads")]
    for x in results[2:]:
        assert x["difference"] < 1e-6
        assert x["both_speedup"] == results[0]["both_ms"] / x["both_ms"]
        assert x["both_weak"] == results[1]["both_ms"] / x["both_ms"]
        assert x["compute_both_ms"] > 0
        assert 0 < x["modeled_forward_ms"] < x["modeled_both_ms"]
        assert 0 <= x["both_imbalance"] <= 1  # of two ranks
    modeled = [(x["ranks"], x["exchange"]) for x in json.loads(file.read_text())["modeled"]]
    assert modeled == [(2, "gather"), (2, "heads"), (4, "gather"), (4, "heads"), (8, "gather")]
    rows = re.findall(r"^\| +(\d) \| +(\d+) \| +(\w+) ", done.stdout, re.M)
    assert [(int(x), int(y), z) for x, y, z in rows] == cases


def test_scaling_measures_some_numbers_of_processes(example, capsys):
    main = example("scaling").main
    sizes = ["--length", "64", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--topk", "2"]
    sizes += ["--block-size", "16", "--repeats", "1", "--device", "cpu"]
    assert [x["ranks"] for x in main([*sizes, "--ranks", "1"])] == [1]
    with pytest.raises(SystemExit, match="--ranks 2 must be one of 1"):
        main([*sizes, "--ranks", "2"])


def test_heads_that_do_not_divide_are_refused(example, capsys):
    main = example("context_parallel").main
    assert "--kv-heads must divide --heads" in fails(main, ["--kv-heads", "3"], capsys)


# ---- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_compiled_training_learns_and_switches(example, text, capsys):
    sizes = ["--dim", "128", "--length", "256", "--block-size", "32", "--device", "cuda"]
    example("train").main(["--text", text, "--steps", "100", "--lr", "3e-3", *TINY, *sizes])
    printed = capsys.readouterr().out
    assert "step 90: FlexMoba(block_size=32, topk=None) from here on" in printed
    assert max(full for _, full in loss_rows(printed)[2:]) < 1.8  # as in the test on CPU


@pytest.mark.gpu
def test_compiled_generation_chooses_the_same_tokens(example):
    sizes = ["--prompt-tokens", "2000", "--topk", "3", "--block-size", "64", "--new-tokens", "16"]
    tokens = example("generate").main([*sizes, "--static", "--device", "cuda"])
    assert tokens["MoBA"][0] == tokens["MoBA, sparse"][0]  # both from the same prefill
    same = tokens["MoBA"] == tokens["MoBA, sparse"]
    # In bfloat16, two logits may be equal; then all later tokens may differ.
    assert same.float().mean() > 0.5


# ---- serving_load.py ----------------------------------------------------------------------------

LOAD = ["--device", "cpu", "--requests", "3", "--longest", "600", "--new-tokens", "5"]
LOAD += ["--attention", "moba", "sdpa"]


def test_a_load_is_served_with_each_attention(example, tmp_path, capsys):
    main, file = example("serving_load").main, tmp_path / "load.json"
    report = main([*LOAD, "--json", str(file)])
    printed = capsys.readouterr().out
    assert list(report["results"]) == ["moba", "sdpa"]
    for result in report["results"].values():
        assert result["mean_gap"] == 0
        first = result["first_token"]
        assert 0 < first["median"] <= first["90 %"] <= first["last"] < result["seconds"]
        assert result["decoding_tokens_per_second"] > 0
        assert result["evicted"] == 0
    assert report["results"]["sdpa"]["attention"] == "sdpa"
    main(["--show", str(file)])
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.mark.parametrize("name", ["serving-cpu", "serving-h100", "serving-small-h200"])
def test_the_documented_loads_are_those_of_the_results(example, name):
    module, page = example("serving_load"), (DOCS / "serving.md").read_text()
    report = json.loads((DOCS / "results" / f"{name}.json").read_text())
    assert module.table_of(report) in page
    if name != "serving-cpu":
        versions = [report[x] for x in ("torch", "triton", "transformers")]
        assert "torch {}, Triton {} and transformers {}".format(*versions) in page
        assert f"on one {report['device']} at {report['commit'][:7]}" in page
    source = page if name == "serving-cpu" else module.__doc__
    lines = re.findall(r"python examples/serving_load.py (--.*)", source.replace("\\\n", ""))
    commands = [{k: int(v) for k, v in re.findall(r"--([a-z-]+) (\d+)", x)} for x in lines]
    assert any(len(x) >= 5 and report["options"].items() >= x.items() for x in commands)


def test_wrong_tokens_under_load_are_found(example, monkeypatch):
    from flexmoba.integrations.transformers import batching

    attend = batching.attend_paged
    monkeypatch.setattr(
        batching, "attend_paged", lambda q, p, b, _, **o: attend(q, p, b, None, **o)
    )
    with pytest.raises(RuntimeError, match="new tokens of moba are wrong by"):
        example("serving_load").main(LOAD)
