"""Tests of the benchmark: its operation counts, its reports, and its check of the results."""

import functools
import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch._dynamo.utils import counters

from flexmoba import moba_select
from flexmoba.bench import Config, baselines, calls, inputs, native_sparse, paged, steps, training
from flexmoba.bench.configs import PRESETS, size
from flexmoba.bench.targets import target_rows
from flexmoba.commands import bench
from flexmoba.commands.cli import main
from flexmoba.nsa import nsa_select
from flexmoba.nsa.reference import reference_masks
from flexmoba.reference import reference_mask, reference_selection
from flexmoba.reporting import versions
from tests.results import DOCS
from tests.results import table as table_of

SMALL = Config(1, 2, 1, 300, 64, 3, head_dim=16)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "cpu", [SMALL])
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1.0)


@pytest.mark.parametrize("block_size", [1, 50, 64, 400])
@pytest.mark.parametrize("topk", [1, 3, 9])
def test_counts_the_products_that_the_oracle_makes(block_size, topk):
    q, k = torch.randn(2, 1, 1, 300, 4)
    config = Config(1, 1, 1, 300, block_size, topk)
    selected = reference_selection(q, k, block_size, topk, is_causal=True)
    assert config.pairs == int(reference_mask(selected, block_size, 300, is_causal=True).sum())
    everything = torch.ones(1, 1, 300, 1, dtype=torch.bool)
    assert config.dense_pairs == int(reference_mask(everything, 300, 300, is_causal=True).sum())


@pytest.mark.parametrize("length", [20, 300, 1200])
def test_counts_the_products_of_native_sparse_attention(length):
    config = Config(1, 1, 1, length, 64, 4, nsa=True)
    own = torch.arange(length) // 64
    selected = torch.arange(-(-length // 64)) <= own[:, None]
    selected &= torch.arange(-(-length // 64)) > own[:, None] - 4  # as many as are selected
    masks = reference_masks(selected[None, None], length, length, 32, 16, 64, 512)
    assert config.pairs == sum(int(mask.sum()) for mask in masks)


def test_measures_native_sparse_attention(monkeypatch, capsys):
    config = Config(1, 4, 2, 300, 64, 4, head_dim=16, nsa=True)
    step = replace(config, batch=2, decode=True, backward=False)
    monkeypatch.setitem(bench.PRESETS, "cpu", [SMALL, config, replace(config, length=400), step])
    options = ["--preset", "cpu", "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    assert "Forward and backward, Native Sparse Attention" in printed
    assert "Decoding steps, Native Sparse Attention" in printed
    assert printed.count("| flex_nsa ms |") == 3
    assert "NSA, 4/2 heads, block 64, topk 4, forward: " in printed


@pytest.mark.parametrize("decode", [False, True])
def test_wrong_results_of_native_sparse_attention_are_found(decode, monkeypatch, capsys):
    config = Config(1, 4, 2, 500, 64, 4, head_dim=16, nsa=True, decode=decode)
    monkeypatch.setitem(bench.PRESETS, "cpu", [config])
    monkeypatch.setattr(native_sparse, "nsa_select", lambda q, *_, **o: nsa_select(-q, *_, **o))
    assert main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"]) == 1
    assert "WRONG: error" in capsys.readouterr().out


def test_measures_batches_over_pages(monkeypatch, tmp_path, capsys):
    step = Config(3, 4, 2, 300, 32, 3, head_dim=16, decode=True, paged=True)
    monkeypatch.setitem(bench.PRESETS, "cpu", [step, replace(step, gate="group", chunk=40)])
    picture = tmp_path / "results.png"
    options = ["--device", "cpu", "--dtype", "float32", "--plot", str(picture)]
    assert main(["bench", "--preset", "cpu", *options]) == 0
    printed = capsys.readouterr().out
    assert "Decoding steps, pages" in printed
    assert "| flex_moba ms | MobaCache | SDPA | topk=None |" in printed
    times = r"\S+ \(\S+x\)"
    assert re.search(rf"\| 3 x 4/2 x 300, 32, 3 \| \S+( \| {times}){{3}} \|\n", printed)
    chunk = "3 x 4/2 x 300, 32, 3, chunk of 40, by group"
    assert re.search(rf"\| {chunk} \| \S+ \|  \|  \| {times} \|\n", printed)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("is_paged", [True, False])
def test_all_timed_steps_of_a_cache_append_the_last_token_of_the_context(is_paged, monkeypatch):
    config = Config(2, 4, 2, 300, 32, 3, head_dim=16, decode=True, backward=False, paged=is_paged)
    module, measured = (paged, paged.measure_paged) if is_paged else (steps, steps.measure_step)
    lengths, call = set(), module.flex_moba

    def step(*args, cache, **options):
        lengths.update(cache.lengths.tolist())
        return call(*args, cache=cache, **options)

    monkeypatch.setattr(module, "flex_moba", step)
    assert measured(config, torch.device("cpu"), torch.float32)["step_ms"]
    assert lengths == {299}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_call_comes_before_each_timed_step(device):
    counts = torch.zeros(2, device=device)
    step, before = functools.partial(counts[:1].add_, 1), counts.zero_
    assert steps.replayed_ms(step, torch.device(device), before) > 0
    assert counts.tolist() == [1, 0]


@pytest.mark.parametrize("chunk", [0, 40])
def test_wrong_results_over_pages_are_found(chunk, monkeypatch, capsys):
    config = Config(1, 4, 2, 300, 32, 3, head_dim=16, decode=True, paged=True, chunk=chunk)
    monkeypatch.setitem(bench.PRESETS, "cpu", [config])
    monkeypatch.setattr(paged, "moba_select", lambda q, *_, **o: moba_select(-q, *_, **o))
    assert main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"]) == 1
    assert "WRONG: error" in capsys.readouterr().out


def test_prints_json_alone(capsys):
    assert (
        main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert set(report["results"][0]["both_ms"]) == {"flex_moba", "SDPA"}


def test_counts_documents_apart():
    config = Config(1, 1, 1, 1000, 50, 3, documents=7)
    assert len(config.lengths) == 7
    assert min(config.lengths) > 0
    assert sum(config.lengths) == 1000
    alone = [Config(1, 1, 1, n, 50, 3) for n in config.lengths]
    assert config.pairs == sum(one.pairs for one in alone)
    assert config.dense_pairs == sum(one.dense_pairs for one in alone)


def test_measures_gates_documents_and_steps(monkeypatch, tmp_path, capsys):
    configs = [
        replace(SMALL, gate="group"),
        replace(SMALL, block_size=128, gate="tile"),
        replace(SMALL, documents=5),
        replace(SMALL, documents=5, longest_known=True),
        replace(SMALL, batch=2, gate="group", decode=True, backward=False),
    ]
    monkeypatch.setitem(bench.PRESETS, "cpu", configs)
    picture = tmp_path / "results.png"
    options = ["--device", "cpu", "--dtype", "float32", "--plot", str(picture)]
    assert main(["bench", "--preset", "cpu", *options]) == 0
    printed = capsys.readouterr().out
    assert "| 1 x 2/1 x 300, 64, 3, by group |" in printed
    assert "| 1 x 2/1 x 300, 64, 3, 5 documents |" in printed
    assert "| 1 x 2/1 x 300, 64, 3, 5 documents, longest known |" in printed
    assert "| one sequence |" in printed
    assert printed.count("| 2 x 2/1 x 300, 64, 3, by group |") == 1
    assert picture.stat().st_size > 10_000


TINY = replace(SMALL, batch=2, length=150, layers=2)


def test_measures_training_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training.torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(training, "_VOCABULARY", 50)
    monkeypatch.setitem(bench.PRESETS, "cpu", [TINY, replace(TINY, topk=2, dense="nothing")])
    picture, file = tmp_path / "results.png", tmp_path / "results.json"
    options = ["--device", "cpu", "--dtype", "float32", "--plot", str(picture)]
    assert main(["bench", "--preset", "cpu", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    row = r"\| 2 x 2/1 x 150, 64, 3, 2 layers \| \S+ \| \S+ \(\S+x\) \| \S+ \(\S+x\) \|"
    assert re.search(row, printed)
    assert re.search(r"\| 2 x 2/1 x 150, 64, 2, 2 layers \| \S+ \|  \|  \|", printed)
    assert "Forward" not in printed
    first, second = json.loads(file.read_text())["results"]
    assert set(first["training_ms"]) == {"flex_moba", "topk=None", "SDPA"}
    assert set(second["training_ms"]) == {"flex_moba"}
    assert first["error"] < first["allowed"] == 1
    assert picture.stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from the compiler itself
def test_training_compiles_layers_once_and_any_number_of_models(monkeypatch):
    monkeypatch.setattr(
        training.torch, "compile", functools.partial(torch.compile, backend="eager")
    )
    monkeypatch.setattr(training, "_VOCABULARY", 50)
    config = replace(TINY, layers=3, dense="nothing")
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (150, 130):
            result = training.measure_training(
                replace(config, length=length), torch.device("cpu"), torch.float32
            )
            assert result["error"] < result["allowed"]
    assert counters["stats"]["unique_graphs"] == 4  # a layer and the head of each model


def test_training_with_wrong_attention_is_not_timed(monkeypatch):
    class Wrong(training.Dense):
        def forward(self, q, k, v, **options):
            return super().forward(q, k, v, **options) * 0.9

    monkeypatch.setattr(training.torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(training, "_VOCABULARY", 50)
    monkeypatch.setattr(training, "Dense", Wrong)
    result = training.measure_training(TINY, torch.device("cpu"), torch.float32)
    assert result["error"] > result["allowed"]
    assert "training_ms" not in result


def test_newer_flash_attention_is_active_for_its_baseline_alone(monkeypatch):
    calls = []
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", calls.append, raising=False)
    monkeypatch.setattr(
        attention, "restore_flash_attention_impl", lambda: calls.append("none"), raising=False
    )
    with baselines.flash_of("SDPA flash"):
        assert calls == []
    with baselines.flash_of("SDPA FA3"):
        assert calls == ["FA3"]
    assert calls == ["FA3", "none"]
    baselines.why_not_flash.cache_clear()
    assert baselines.why_not_flash("FA3") is None

    def missing(version):
        raise ImportError(f"no {version} here\nand more")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", missing)
    assert baselines.why_not_flash("FA4") == "ImportError: no FA4 here"
    baselines.why_not_flash.cache_clear()


@pytest.mark.parametrize(("block_size", "topk"), [(512, 3), (128, 8)])
def test_correlated_queries_share_blocks_as_in_a_language_model(block_size, topk):
    config = Config(1, 3, 1, 8192, block_size, topk, correlated=True)
    q, k, v, grad = inputs.inputs_of(config, torch.device("cpu"), torch.float32)
    again = inputs.inputs_of(config, torch.device("cpu"), torch.float32)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, grad), again, strict=True))
    assert (q.shape, k.shape) == ((1, 3, 8192, 128), (1, 1, 8192, 128))
    for x in (q, k, v, grad):
        assert abs(float(x.var()) - 1) < 0.05
    past = moba_select(q, k, block_size, topk)[0, :, :, 1:].long()
    selected = torch.zeros(3, 8192, 8192 // block_size, dtype=torch.bool)
    selected.scatter_(2, past.clamp(min=0), past >= 0)
    selected = selected[:, 2 * topk * block_size :]  # these queries have a choice
    one, next_one = selected[:, :-1], selected[:, 1:]
    shared = (one & next_one).sum(-1) / (one | next_one).sum(-1)
    assert 0.6 < float(shared.mean()) < 0.8
    of_tiles = selected.unflatten(1, (-1, 64)).any(2).sum(-1) / (topk - 1)
    assert 2.0 < float(of_tiles.mean()) < 2.6


@pytest.mark.parametrize("changes", [{"documents": 5}, {"decode": True, "backward": False}])
def test_a_wrong_choice_is_found_out(changes, monkeypatch, capsys):
    def worst(q, k, *args, **options):  # the selection of the exact result
        return moba_select(-q, k, *args, **options)

    monkeypatch.setitem(bench.PRESETS, "cpu", [replace(SMALL, length=400, topk=2, **changes)])
    monkeypatch.setattr(calls, "moba_select", worst)
    monkeypatch.setattr(steps, "moba_select", worst)
    assert main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"]) == 1
    assert "WRONG: error" in capsys.readouterr().out


def test_measures_reports_and_shows_again(tmp_path, capsys):
    file, picture = tmp_path / "results.json", tmp_path / "results.png"
    options = ["--device", "cpu", "--dtype", "float32"]
    assert main(["bench", "--preset", "cpu", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| 1 x 2/1 x 300, 64, 3 |" in printed
    assert "Forward and backward" in printed
    report = json.loads(file.read_text())
    assert report.items() >= versions().items()
    assert set(report["results"][0]["forward_ms"]) == {"flex_moba", "SDPA"}
    assert main(["bench", "--show", str(file), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == bench.tables(report)
    assert bench.tables(report) in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_what_is_wrong_is_not_timed(wrong, monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.json"
    monkeypatch.setattr(calls, "flex_moba", lambda q, *_, **__: torch.full_like(q, wrong))
    options = ["--device", "cpu", "--dtype", "float32", "--json", str(file)]
    assert main(["bench", "--preset", "cpu", *options, "--plot", str(tmp_path / "x.png")]) == 1
    printed = capsys.readouterr()
    assert "WRONG: error" in printed.out
    assert "this report has no times to draw; pass a report of timed results" in printed.err
    assert "forward_ms" not in json.loads(file.read_text())["results"][0]


def test_an_interruption_costs_no_result_before_it(monkeypatch, capsys):
    def interrupted(config, *_):
        if config.topk == 2:
            raise KeyboardInterrupt
        return calls.measure(config, *_)

    monkeypatch.setitem(bench.PRESETS, "cpu", [SMALL, replace(SMALL, topk=2)])
    monkeypatch.setattr(bench, "measure", interrupted)
    with pytest.raises(SystemExit) as raised:
        main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"])
    assert "| 1 x 2/1 x 300, 64, 3 |" in capsys.readouterr().out
    assert raised.value.code == 130


@pytest.mark.parametrize("ways", ["forward", "backward"])
def test_a_failure_costs_no_other_result(ways, monkeypatch, tmp_path, capsys):
    measure, time_both = calls.measure, calls.time_both

    def failing(config, *_):
        if config.topk == 2:
            raise torch.OutOfMemoryError("too large\nand more")
        return measure(config, *_)

    def failing_backward(call, inputs, grad, config, *_):
        if config.topk == 2:
            raise torch.OutOfMemoryError("too large\nand more")
        return time_both(call, inputs, grad, config, *_)

    configs = [SMALL, replace(SMALL, topk=2), replace(SMALL, topk=4)]
    monkeypatch.setitem(bench.PRESETS, "cpu", configs)
    if ways == "forward":
        monkeypatch.setattr(bench, "measure", failing)
    else:
        monkeypatch.setattr(calls, "time_both", failing_backward)
    file = tmp_path / "results.json"
    options = ["--device", "cpu", "--dtype", "float32", "--json", str(file)]
    assert main(["bench", "--preset", "cpu", *options]) == 1
    printed = capsys.readouterr().out
    failed = "FAILED: OutOfMemoryError: too large"
    assert f"1 x 2/1 x 300, 64, 2: {failed}" in printed
    assert f"| 1 x 2/1 x 300, 64, 2 |  | {failed} |" in printed
    assert printed.count("| 1 x 2/1 x 300, 64, 4 |") == 2
    assert ("forward_ms" in json.loads(file.read_text())["results"][1]) == (ways == "backward")


def test_the_targets_are_measured(monkeypatch, tmp_path, capsys):
    shapes = {config: replace(config, length=300, block_size=64) for config in PRESETS["targets"]}
    small = [
        replace(x, heads=x.heads // x.kv_heads, kv_heads=1, head_dim=x.head_dim // 8,
                value_dim=None if x.value_dim is None else x.value_dim // 8)
        for x in shapes.values()
    ]  # fmt: skip
    monkeypatch.setitem(bench.PRESETS, "targets", small)
    file = tmp_path / "results.json"
    options = ["--device", "cpu", "--dtype", "float32", "--json", str(file)]
    assert main(["bench", "--preset", "targets", *options]) == 0
    report = json.loads(file.read_text())
    results = report["results"]
    assert [bool(x.get("both_ms")) for x in results] == [x.backward for x in small]
    assert [x["quantity"] for x in report["targets"]] == [x.target for x in small]
    table = capsys.readouterr().out.split("Targets\n\n")[1]
    assert table.count("\n| 1 x ") == len(small)


def test_compares_results_with_targets():
    usual = replace(SMALL, head_dim=128, target="times cuDNN", forward_target=2, both_target=3)
    wide = replace(usual, head_dim=192, value_dim=128, target="time of head dim 128")
    full = replace(SMALL, topk=None, target="times the fastest", forward_target=1, both_target=1)
    gate = replace(SMALL, target="share of the gate", forward_target=0.5, both_target=0)
    longest = replace(SMALL, target="milliseconds", forward_target=3700)

    def times(ours, **dense):
        return {"flex_moba": ours} | {f"SDPA {name}": ms for name, ms in dense.items()}

    results = [
        (SMALL, {"forward_ms": times(1.0)}),
        (usual, {"forward_ms": times(2.0, cuDNN=4.0, flash=3.0), "both_ms": times(2.0, cuDNN=5.0),
                 "forward_MiB": 1.0, "both_MiB": 20.4}),
        (wide, {"forward_ms": times(4.2), "both_ms": times(5.0)}),
        (full, {"forward_ms": times(2.0, cuDNN=4.0, flash=3.0)}),
        (gate, {"forward_ms": times(2.0), "split_ms": {"gate": 0.5}}),
        (longest, {"forward_ms": times(4000.0)}),
        (longest, {"failed": "OutOfMemoryError"}),
    ]  # fmt: skip
    rows = [list(row.values())[2:] for row in target_rows(results, "float32")]
    # q and the output of 2 heads of 300 tokens take 0.586 MiB, the output half of it.
    assert rows == [
        ["2", "2 (reached)", "2.5", "3 (missed)", "1.21x", "20"],
        ["2.1", "2 (missed)", "2.5", "3 (reached)", "", ""],
        ["1.5", "1 (reached)", "", "1", "", ""],
        ["0.25", "0.5 (reached)", "", "", "", ""],
        ["4000", "3700 (missed)", "", "", "", ""],
        ["", "3700", "", "", "", ""],
    ]


def test_counts_the_products_of_full_attention_and_of_two_head_dims():
    full = Config(1, 1, 1, 300, 64, None)
    assert full.pairs == full.dense_pairs
    dims = replace(SMALL, head_dim=24, value_dim=8)
    assert dims.flop(backward=False) == 2 * 2 * dims.pairs * (24 + 8)
    assert dims.flop(backward=True) == 2 * 2 * dims.pairs * (4 * 24 + 3 * 8)


def test_prints_each_result_before_the_next_is_measured(monkeypatch, capsys):
    printed = []

    def measured(config, *_):
        printed.append(capsys.readouterr())
        return calls.measure(config, *_)

    monkeypatch.setitem(bench.PRESETS, "cpu", [SMALL, replace(SMALL, topk=2)])
    monkeypatch.setattr(bench, "measure", measured)
    assert main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"]) == 0
    assert printed[0].err.endswith("1 of 2: 1 x 2/1 x 300, 64, 3\n")
    line = r"1 x 2/1 x 300, 64, 3: forward \S+ ms, SDPA \S+ \(\S+x\); both ways .*\n"
    assert re.fullmatch(line, printed[1].out)
    assert printed[1].err == "2 of 2: 1 x 2/1 x 300, 64, 2\n"


def test_on_a_cpu_quick_is_quick(monkeypatch, capsys):
    monkeypatch.setitem(bench.PRESETS, "quick", None)
    assert main(["bench", "--preset", "quick", "--device", "cpu", "--dtype", "float32"]) == 0
    assert "| 1 x 2/1 x 300, 64, 3 |" in capsys.readouterr().out


def result_of(length, ours, *dense, **changes):
    times = {"flex_moba": ours} | dict(zip(("SDPA flash", "SDPA cuDNN"), dense, strict=False))
    timed = {"forward_ms": times, "both_ms": None, "forward_MiB": None}
    return asdict(replace(SMALL, length=length, **changes)) | timed | {"error": 0, "allowed": 1}


def test_shows_the_time_of_a_call_on_an_idle_gpu():
    timed = result_of(1024, 3) | {"forward_alone_ms": 3.456, "both_alone_ms": 9.0}
    results = [result_of(512, 2), timed, result_of(2048, 5) | {"forward_alone_ms": 5.0}]
    text = bench.tables({"results": results, "matrix_tflops": 1.0, "dtype": "bfloat16"})
    _, _, headings, _, *rows = text[text.index("One call") :].splitlines()[:6]
    assert headings == "| batch x heads x length, block, topk | forward | forward + backward |"
    assert rows == ["| 1 x 2/1 x 1K, 64, 3 | 3.46 | 9.00 |", "| 1 x 2/1 x 2K, 64, 3 | 5.00 |  |"]


def test_says_where_it_begins_to_pay():
    results = [result_of(1024, 3, 4, 2), result_of(4096, 3, 5, 4, dense="SDPA")]
    results += [result_of(1024, 3, 4, topk=2), result_of(2048, 3, 2, topk=2)]
    results += [result_of(1024, 3, 4, topk=5), result_of(2048, 3, topk=5)]
    lines = bench.tables(
        {"results": results, "matrix_tflops": 1.0, "dtype": "bfloat16"}
    ).splitlines()
    assert lines[-2:] == [
        "2/1 heads, block 64, topk 3, forward: faster than dense attention from 4K tokens",
        "2/1 heads, block 64, topk 2, forward: not faster at 2K tokens",
    ]


@pytest.mark.parametrize("file", sorted((DOCS / "benchmarks").glob("*.json")), ids=lambda x: x.stem)
def test_documented_tables_are_those_of_the_results(file):
    tables = bench.tables(json.loads(file.read_text()))
    documented = (DOCS / "benchmarks.md").read_text()
    for table in re.findall(r"(?:^\|.*\n?)+", tables, flags=re.MULTILINE):
        assert table.strip() in documented


def over_cudnn(result):
    """Returns cells of both passes: the time, and the time of cuDNN divided by it."""
    cells = []
    for times in (result["forward_ms"], result["both_ms"]):
        ours = next(iter(times.values()))
        cells += [f"{ours:.2f}", f"{times['SDPA cuDNN'] / ours:.1f}x"]
    return cells


def test_the_leading_table_is_that_of_the_results():
    rows = []
    for result in json.loads((DOCS / "benchmarks" / "h100-targets.json").read_text())["results"]:
        if result["target"] != "times cuDNN" or result["length"] > 2**17:
            continue
        sizes = [size(result["length"]), f"{result['block_size']}/{result['topk']}"]
        rows.append(f"| {' | '.join(sizes + over_cudnn(result))} |\n")
    table = re.search(
        r"^\| tokens .*\n.*\n((?:\|.*\n)+)", (DOCS / "benchmarks.md").read_text(), re.M
    )
    assert table[1] == "".join(rows)


def test_the_table_of_nsa_is_that_of_the_results():
    for device, heading in ("h100", "## Speed"), ("h200", "The same command on one NVIDIA H200"):
        results = json.loads((DOCS / "benchmarks" / f"{device}-nsa.json").read_text())["results"]
        rows = [[size(x["length"]), *over_cudnn(x)] for x in results if not x["decode"]]
        assert table_of(heading, "docs/nsa.md") == rows


def test_a_missing_baseline_costs_no_result(monkeypatch, capsys):
    def missing(*_, **__):
        raise RuntimeError("no such backend\nand many more lines")

    monkeypatch.setattr(baselines.F, "scaled_dot_product_attention", missing)
    assert main(["bench", "--preset", "cpu", "--device", "cpu", "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert "SDPA failed: no such backend\n" in printed.err
    assert "| 1 x 2/1 x 300, 64, 3 |" in printed.out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder nowhere"),
        (["--plot", "nowhere/x.png"], "--plot nowhere/x.png: there is no folder nowhere"),
        (["--plot", "x.xyz"], "--plot x.xyz: matplotlib has no format '.xyz'"),
        (["--show", "nowhere.json"], "--show nowhere.json: there is no such file"),
        (["--show", "README.md"], "--show README.md: this is not a report of flexmoba bench"),
    ],
)
def test_what_cannot_be_written_is_known_before_measuring(options, text, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit) as error:
        main(["bench", "--device", "cpu", "--dtype", "float32", *options])
    assert error.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "info"])
def test_a_missing_device_is_named(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        main([command, "--device", "cuda"])
    assert error.value.code == 2
    assert "there is no CUDA device; use --device cpu" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert "example: flexmoba bench" in text
    assert set(bench.PRESETS) <= set(re.findall(r"^  (\w+)  +", text, re.M))
