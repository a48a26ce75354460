"""Tests of the command line: help, JSON, exit codes, and errors that name the remedy."""

import json
import math
import re
import sys
from subprocess import PIPE, Popen

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoba.commands import cli, demo, info
from flexmoba.commands.cli import main
from flexmoba.reporting import check_writable, faster_from, note_load, progress, table, versions
from flexmoba.tune import sample_positions, sampled, synthetic, tune

REPORTING = ("demo", "bench", "tune", "info")
COMMANDS = (*REPORTING, "serve")
SMALL = ["--block-sizes", "16", "32", "--topks", "2", "4", "--device", "cpu"]
EXAMPLE = ["tune", "--example", "--length", "200", *SMALL]


def fails(arguments, capsys):
    """Returns the error of wrong usage, which exits with 2 and prints nothing to stdout."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


# ---- All commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert f"example: flexmoba {command}" in text
    assert cli.EXIT_CODES in text
    assert ("--json" in text.split("example:")[0]) == (command in REPORTING)


def test_help_of_all_names_every_command_and_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert cli.EXIT_CODES in text
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("flexmoba 0.")


@pytest.mark.parametrize("command", [["demo"], ["bench"], ["tune", "--example"], ["info"]])
@pytest.mark.parametrize(
    ("device", "text"),
    [("nothing", "unknown device type; use cuda or cpu"), ("meta", "use cpu")],
)
def test_an_unknown_device_is_named(command, device, text, capsys):
    error = fails([*command, "--device", device], capsys)
    assert f"--device: {device}: " in error
    assert text in error


@pytest.mark.parametrize("command", [["demo"], ["tune", "--example"], ["info"]])
def test_what_cannot_be_written_is_known_at_once(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "standard_library", None)
    gone = str(tmp_path / "nowhere" / "x.json")
    assert "there is no folder" in fails([*command, "--json", gone], capsys)
    assert "this is a folder; pass a file in it" in fails(
        [*command, "--json", str(tmp_path)], capsys
    )
    too_long = str(tmp_path / ("x" * 300))
    assert "cannot be written (File name too long)" in fails([*command, "--json", too_long], capsys)
    assert list(tmp_path.iterdir()) == []


def test_finding_out_whether_a_file_can_be_written_leaves_it_alone(tmp_path):
    (tmp_path / "old.json").write_text("old")
    check_writable(json=tmp_path / "old.json", plot=tmp_path / "new.png")
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [("old.json", "old")]


def test_a_picture_of_an_unknown_format_is_known_at_once(capsys):
    assert "use the suffix .png, .svg or .pdf" in fails([*EXAMPLE, "--plot", "x.xyz"], capsys)
    assert "use the suffix .png, .svg or .pdf" in fails([*EXAMPLE, "--plot", "x"], capsys)


def test_what_cannot_be_written_after_all_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(info, "check_writable", lambda **_: None)
    with pytest.raises(SystemExit) as error:
        main(["info", "--device", "cpu", "--json", str(tmp_path)])
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["auto"] == "portable"
    assert "cannot be written (Is a directory); copy the JSON above" in printed.err


def test_a_key_that_interrupts_leaves_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    with pytest.raises(SystemExit) as error:
        main(["info", "--device", "cpu"])
    assert error.value.code == 130
    assert capsys.readouterr().err == "flexmoba: interrupted\n"


def test_a_reader_that_has_enough_leaves_no_traceback():
    run = "from flexmoba.commands.cli import main\n"
    run += 'raise SystemExit(main(["info", "--device", "cpu"]))'
    with Popen([sys.executable, "-c", run], stdout=PIPE, stderr=PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["info", "--head-dim", "0"], "--head-dim: must be at least 1, got 0"),
        (["demo", "--seconds", "0"], "--seconds: must be at least 1, got 0"),
        (["info", "--head-dim", "many"], "--head-dim: must be an integer, got 'many'"),
        (["demo", "--max-length", "1000"], "--max-length 1000: must be from 1024 to "),
        (["demo", "--max-length", "99999999"], "--max-length 99999999: must be from 1024 to "),
        (["demo", "--output", f"{__file__}/x"], "the folder cannot be created (Not a directory)"),
        (["tune", "--example", "--mass", "1.5"], "--mass: must be greater than 0 and at most 1"),
        (["tune", "--example", "--mass", "much"], "--mass: must be a number, got 'much'"),
        (["tune", "--example", "--sink-blocks", "-1"], "sink_blocks must be at least 0, got -1"),
        (["tune", "--example", "--latency-ms", "0"], "--latency-ms: must be a positive number"),
        (["tune", "--example", "--latency-ms", "nan"], "--latency-ms: must be a positive number"),
        (["tune"], "one of the arguments --model --tensors --example is required"),
        ([*EXAMPLE, "--mass", "0.9", "--sparsity", "0.9"], "not allowed with argument"),
        ([*EXAMPLE, "--no-times", "--latency-ms", "3"], "need times; remove --no-times"),
        ([*EXAMPLE, "--no-times", "--backward"], "need times; remove --no-times"),
        ([*EXAMPLE, "--text", "README.md"], "--model and --text go together"),
        (["tune", "--model", "nowhere"], "--model and --text go together"),
        (
            ["tune", "--model", "nowhere", "--text", "x"],
            "there is no such folder; download the model first",
        ),
        (["tune", "--tensors", "nowhere.pt"], "--tensors nowhere.pt: there is no such file"),
        (["tune", "--example", "--length", "30"], "select all of 30 keys; use smaller blocks"),
    ],
)
def test_wrong_usage_is_told_with_its_remedy(arguments, text, capsys):
    assert text in fails(arguments, capsys)


# ---- tune ---------------------------------------------------------------------------------------


def test_tune_prints_a_table_and_advice(capsys):
    assert main([*EXAMPLE, "--mass", "0.01", "--backward"]) == 0
    out = capsys.readouterr().out
    assert "queries and keys: synthetic, from no model" in out
    assert "batch 1, heads 4/2, length 200, head dim 64, float32" in out
    assert out.count("\n|") == 2 + 4
    assert out.count("<-") == 1
    assert "ms forward and backward" in out
    advice = out.splitlines()[-1]
    row = [x.strip() for x in next(x for x in out.splitlines() if "<-" in x).split("|")]
    assert f"block_size={row[2]}, topk={row[3]}." in advice
    assert f"captures {row[5]} of full attention, {row[8]} in the worst" in advice
    assert f"captures {row[6]}, so the gate loses {row[7]}." in advice


def test_tune_prints_json_alone_or_writes_it(tmp_path, capsys):
    options = [*EXAMPLE, "--no-times", "--sparsity", "0.5", "--gate-block-sizes", "4"]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    file = tmp_path / "tune.json"
    assert main([*options, "--json", str(file)]) == 0
    assert "| block | sub-block |" in capsys.readouterr().out
    assert json.loads(file.read_text()) == report
    expected = tune([synthetic(200)], (16, 32), (2, 4), gate_block_sizes=(4,), timed=False)
    assert report["choices"] == expected.to_dict()["choices"]
    best = expected.recommend(sparsity=0.5)
    assert report["recommended"] == expected.choices.index(best)
    assert report["budget"] == "sparsity 0.5"


def test_tune_measures_sub_blocks_and_always_selected_blocks(tmp_path, capsys):
    file, torch_file = tmp_path / "tune.json", tmp_path / "qk.pt"
    q, k = torch.randn(2, 1, 2, 200, 16)
    torch.save({"q": q, "k": k}, torch_file)
    options = ["tune", "--tensors", str(torch_file), "--block-sizes", "16", "--topks", "3", "4"]
    options += ["--no-times", "--mass", "0.01", "--gate-block-sizes", "4"]
    options += ["--sink-blocks", "1", "--local-blocks", "1"]
    assert main([*options, "--json", str(file)]) == 0
    always = {"sink_blocks": 1, "local_blocks": 1}
    report = tune([sampled(q, k, 256)], (16,), (3, 4), gate_block_sizes=(4,), **always, timed=False)
    assert json.loads(file.read_text())["choices"] == report.to_dict()["choices"]
    assert ", sink_blocks=1, local_blocks=1. It captures" in capsys.readouterr().out


def test_tune_fails_if_nothing_keeps_to_the_budget(capsys):
    assert main([*EXAMPLE, "--no-times", "--sparsity", "0.999"]) == 1
    assert "no measured choice meets this budget. block_size=" in capsys.readouterr().out
    assert main([*EXAMPLE, "--latency-ms", "1e-9", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["recommended"] is None


def test_tune_says_each_result_and_loses_none(tmp_path, monkeypatch, capsys):
    timed, file = [], tmp_path / "tune.json"

    def interrupted(*_, **__):
        timed.append(capsys.readouterr())
        if len(timed) == 4:  # dense attention, two choices, and the third
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("flexmoba.tune.measure.median_ms", interrupted)
    with pytest.raises(SystemExit) as error:
        main([*EXAMPLE, "--json", str(file)])
    assert error.value.code == 130
    assert timed[1].err == "time 1 of 4: block_size=16, topk=2\n"
    line = r"block 16, topk 2: captures \S+%, 1.00 ms forward \(1.0x\)\n"
    assert re.fullmatch(line, timed[2].out)
    assert timed[2].err == "time 2 of 4: block_size=16, topk=4\n"
    printed = capsys.readouterr()
    assert printed.out.count("\n|") == 2 + 2
    assert printed.err == "flexmoba: interrupted\n"
    assert [x["topk"] for x in json.loads(file.read_text())["choices"]] == [2, 4]


def test_tune_draws(tmp_path):
    file = tmp_path / "tune.png"
    assert main([*EXAMPLE, "--no-times", "--mass", "0.1", "--plot", str(file)]) == 0
    assert file.stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_after_all_costs_no_result(monkeypatch, capsys):
    monkeypatch.setattr("flexmoba.commands.tune.check_writable", lambda **_: None)
    with pytest.raises(SystemExit) as error:
        main([*EXAMPLE, "--no-times", "--plot", "nowhere/x.png"])
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert "| block |" in printed.out
    assert "--plot nowhere/x.png: cannot be written (No such file or directory)" in printed.err


def test_tune_says_that_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = fails([*EXAMPLE, "--plot", "x.png"], capsys)
    assert "--plot needs matplotlib; run pip install 'flexmoba[plot]'" in error


def from_tensors(file, capsys):
    arguments = ["tune", "--tensors", str(file), *SMALL, "--no-times", "--queries", "50", "--json"]
    main(arguments)
    return json.loads(capsys.readouterr().out)


def test_tune_reads_tensors(tmp_path, capsys):
    q, k = synthetic(200, seed=1)
    expected = tune([(q, k)], (16, 32), (2, 4), queries=50, timed=False).to_dict()
    torch.save({"q": q, "k": k}, tmp_path / "one.pt")
    one = from_tensors(tmp_path / "one.pt", capsys)
    assert one["choices"] == expected["choices"]
    torch.save({"0.q": q, "0.k": k, "1.q": k, "1.k": k, "v": q}, tmp_path / "two.pt")
    two = from_tensors(tmp_path / "two.pt", capsys)
    assert two["layers"] == ["0", "1"]
    assert two["choices"][0]["heads"][0] == expected["choices"][0]["heads"][0]
    assert len(two["choices"][0]["heads"][1]) == 2


def test_tune_reads_safetensors(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    q, k = synthetic(200, seed=1)
    safetensors.save_file({"q": q, "k": k}, tmp_path / "one.safetensors")
    torch.save({"q": q, "k": k}, tmp_path / "one.pt")
    one, other = (from_tensors(tmp_path / f"one.{x}", capsys) for x in ("safetensors", "pt"))
    assert one == other


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"q": torch.zeros(1, 1, 4, 2)}, 'must have "q" and "k", or pairs'),
        ({"keys": torch.zeros(1, 1, 4, 2)}, "got keys; rename the tensors"),
        (
            {f"{i}.w": torch.zeros(1) for i in range(9)},
            "got 0.w, 1.w, 2.w, 3.w, 4.w, 5.w, 6.w, ",
        ),
        ([torch.zeros(1, 1, 4, 2)], "it must hold a dict of dense tensors"),
        ({"q": {"a": torch.zeros(1, 1, 4, 2)}}, "it must hold a dict of dense tensors"),
        ({"q": torch.zeros(1, 1, 4, 2).to_sparse()}, "it must hold a dict of dense tensors"),
        ({"q": torch.zeros(4, 2), "k": torch.zeros(4, 2)}, "'k': q must have four dimensions"),
        ({"q": torch.zeros(1, 1, 4, 2).int(), "k": torch.zeros(1, 1, 4, 2)}, "cast it first"),
        (
            {"a.q": torch.zeros(1, 1, 4, 2), "a.k": torch.zeros(1, 1, 4, 2).half()},
            "x.pt, 'a.q' and 'a.k': q and k must have the same dtype",
        ),
        ({"q": torch.zeros(1, 1, 4, 2), "k": torch.zeros(1, 1, 3, 2)}, "at least as many keys"),
    ],
)
def test_tune_refuses_tensors(content, text, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    error = fails(["tune", "--tensors", str(tmp_path / "x.pt")], capsys)
    assert text in error
    assert error.count("\n") == 1


def test_tune_refuses_what_holds_no_tensors(tmp_path, capsys):
    (tmp_path / "x.pt").write_text("no tensors")
    error = fails(["tune", "--tensors", str(tmp_path / "x.pt")], capsys)
    assert 'torch.save({"q": q, "k": k}, FILE)' in error
    pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_text("no tensors")
    error = fails(["tune", "--tensors", str(tmp_path / "x.safetensors")], capsys)
    assert 'safetensors.torch.save_file({"q": q, "k": k}, FILE)' in error


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Returns the folder of a small random Llama with a tokenizer of one token per word."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_tune_reads_a_model(language_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a b b a c " * 50)
    source = ["tune", "--model", str(language_model), "--text", str(text), "--length", "200"]
    assert main([*source, *SMALL, "--no-times", "--mass", "0.01", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert report["inputs"] == "batch 1, heads 4/2, length 200, head dim 8, float32"
    assert report["example"] is None


def test_tune_refuses_a_folder_without_a_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("a b")
    source = ["tune", "--model", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    assert "transformers cannot load it" in fails([*source, "--device", "cpu"], capsys)


# ---- demo and info ------------------------------------------------------------------------------

DEMO = ["demo", "--device", "cpu", "--seconds", "1", "--max-length", "1024"]


def test_demo_trains_checks_times_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LENGTH", 320)
    assert main([*DEMO, "--output", str(tmp_path / "made"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.items() >= versions().items()
    assert set(report["bits_per_byte"]) == {"full", "moba"}
    assert report["oracle"]["error"] <= report["oracle"]["allowed"]
    assert 0 < report["captured"]["mass"] <= report["captured"]["best_mass"] < 1
    assert [row["length"] for row in report["times"]] == [1024]
    for name in ("selection.png", "choices.png"):
        assert str(tmp_path / "made" / name) in report["pictures"]
        assert (tmp_path / "made" / name).stat().st_size > 5_000


def test_demo_says_each_result_and_loses_none(tmp_path, monkeypatch, capsys):
    lengths, file = [], tmp_path / "demo.json"

    def timed(call, device, **_):
        lengths.append(capsys.readouterr().out)
        if len(lengths) == 5:  # one length is done
            raise KeyboardInterrupt
        return 2.0 + len(lengths)

    monkeypatch.setattr(demo, "LENGTH", 128)
    monkeypatch.setattr(demo, "median_ms", timed)
    options = ["demo", "--device", "cpu", "--seconds", "1", "--max-length", "2100"]
    with pytest.raises(SystemExit) as error:
        main([*options, "--output", str(tmp_path), "--json", str(file)])
    assert error.value.code == 130
    assert lengths[0].splitlines()[-1].startswith("| -----: |")
    row = "|  1,050 |           3.0 |           5.0 |     0.6x |"
    row += "             4.0 |             6.0 |     0.7x |\n"
    assert lengths[4] == row
    report = json.loads(file.read_text())
    assert [x["length"] for x in report["times"]] == [1050]
    assert report["oracle"]["error"] <= report["oracle"]["allowed"]
    assert {x.name for x in tmp_path.iterdir()} == {"demo.json", *demo.PICTURES}


def test_demo_draws_at_the_length_of_the_training(tmp_path, monkeypatch):
    drawn = []

    def plot(selection, block_size):
        drawn.append(selection.shape)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "LENGTH", 192)
    monkeypatch.setattr("flexmoba.plot.plot_heads", plot)
    with pytest.raises(SystemExit):
        main([*DEMO, "--output", str(tmp_path)])
    assert drawn[0][2] == 192


def test_demo_fails_if_the_oracle_disagrees(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LENGTH", 128)
    monkeypatch.setattr(demo, "flex_moba", lambda q, *_: q * math.nan)
    assert main([*DEMO, "--output", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert "flex_moba disagrees with the oracle" in printed.err
    report = json.loads(printed.out)
    assert report["oracle"]["other_block"] == 1
    assert report["times"] == report["pictures"] == []
    assert list(tmp_path.iterdir()) == []


def test_info_writes_json_beside_its_table(tmp_path, capsys):
    file = tmp_path / "info.json"
    assert main(["info", "--device", "cpu", "--json", str(file)]) == 0
    assert "<- auto" in capsys.readouterr().out
    assert json.loads(file.read_text())["auto"] == "portable"


# ---- Shared helpers -----------------------------------------------------------------------------


def test_a_table_is_aligned():
    text = table(["a", "name"], [["1", "x"], ["22222", "y"]])
    assert text.splitlines() == [
        "|     a | name |",
        "| ----: | ---: |",
        "|     1 |    x |",
        "| 22222 |    y |",
    ]


def test_progress_is_noted_now_and_then(capsys):
    assert list(progress([1, 2], "x")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress([1, 2], "x", seconds=0)) == [1, 2]
    assert capsys.readouterr().err == "x: 0 of 2\nx: 1 of 2\n"


@pytest.mark.parametrize(
    ("load", "policy", "noted"), [(0.2, "", False), (6.0, "", True), (6.0, "PASSIVE", False)]
)
def test_a_load_that_slows_threads_is_noted(load, policy, noted, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    note_load("cpu")
    note_load("cuda")
    expected = "2 threads on 2 cores with a load of 6.0: "
    assert capsys.readouterr().err.startswith(expected) == noted


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), max_size=6))
def test_where_it_begins_to_pay(times):
    expected = None
    for length in sorted({x for x, _, _ in times}):
        if all(ours < other for x, ours, other in times if x >= length):
            expected = length
            break
    assert faster_from(times) == expected


def test_the_example_has_a_structure_that_is_kept():
    q, k = synthetic(2000)
    again = synthetic(2000)
    assert torch.equal(q, again[0])
    assert torch.equal(k, again[1])
    choice = tune([(q, k)], (128,), (4,), timed=False).choices[0]
    noise = tune([(torch.randn_like(q), torch.randn_like(k))], (128,), (4,), timed=False).choices[0]
    assert choice.snr > 2 * noise.snr
    assert choice.found > noise.found
    assert sample_positions(2000, 256).diff().min() > 0
