"""Train one small GPT for each way to attend, side by side on several GPUs, and compare.

Every configuration is a run of train.py with the same seed, contexts and number of tokens, unless
its name says otherwise. Each GPU takes the next one of the list as soon as it is free. After
--minutes all stop with a checkpoint in --work; the same command goes on from there, unfinished runs
first. A run that fails stops no other. --results is written anew every few seconds:

  {"corpus": ..., "smoke": {name: ...}, "runs": {name: {"status": ..., "final": ..., ...}}}

  status      "done", "stopped" by the clock, "failed", or "running"
  final       validation loss: in all, of the first, middle and last eighth of the context, by
              position, by context; and of a span that the context holds once before, by depth
  history     means of the loss of ten steps, seconds since the first step after each ten,
              seconds of the tens that compiled, and validation losses on the way

With --smoke every configuration makes a few steps first, on random tokens, while corpus.py makes
the corpus. The kernel of full attention is then the fastest that ran, or --dense.

toy size, three minutes on a CPU:
  python examples/sweep.py --toy --work sweep --results sweep.json

full size, 23 minutes on two H100 (`pip install tokenizers`):
  python examples/sweep.py --only full 64x16 128x8 "128x8 conv" --dense cudnn \\
      --also /usr/include /usr/local/cuda/include --work sweep --results sweep.json

The next four then run with `--have sweep.json`, so that all are in one file.

continued training of a pretrained model, in a folder of yours, on two GPUs; --work/models then
holds the trained models:
  python examples/sweep.py --model ./smollm2 --work sweep --results sweep.json
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexmoba.reporting import positive, table

HERE = Path(__file__).parent

# 39M parameters, contexts of 16,384 tokens, 65,536 tokens to a step. Why so:
#
#   --qk-norm, --lr 3e-3  a high rate without growing logits of attention (arXiv 2309.14322)
#   --optimizer muon      the loss of AdamW with about half the tokens (arXiv 2502.16982)
#   --short-length        a step sees 32 places of the corpus, not 4, while batches need not be
#                         large; contexts that grow also keep early steps stable (arXiv 2108.06084)
#   --to-zero             for as many tokens per parameter as here, lower than a cosine to a tenth
#                         (arXiv 2502.15938)
#   --rope-base           a larger base for a longer context (arXiv 2309.16039)
#
# There is no z-loss: the logits of the vocabulary are in float32, and earlier runs were stable.
MODEL = "--layers 8 --dim 512 --heads 8 --kv-heads 2 --length 16384 --batch 4 --lr 3e-3"
MODEL += " --qk-norm --optimizer muon --to-zero --short-length 2048 --short-share 0.3"
MODEL += " --rope-base 100000 --every 250 --windows 96 --check-windows 16"
STEPS = 5500  # 360M tokens, 2.1 epochs of a corpus of 176M: up to four are nearly as good as new
# text (arXiv 2305.16264)

LONG = "--length 32768 --batch 2 --windows 48 --check-windows 8"
HALF = f"{LONG} --steps 2750"  # 180M tokens
SUB_BLOCKS = "--attention moba --block-size 64 --topk 16 --gate-block-size 8"
ONE_KV_HEAD = "--kv-heads 1 --steps 1400"  # 92M tokens
# By name; a name says block size x topk. In groups of four, 8 to 12 minutes each on one H100.
# 1,024 keys of 16,384 are 94 % sparsity in the paper's terms, 4,096 are 75 %.
RUNS = {
    "full": "--attention full --block-size 128 --topk 8",  # and evaluated with these blocks
    "64x16": "--attention moba --block-size 64 --topk 16",
    "128x8": "--attention moba --block-size 128 --topk 8",
    "128x8 conv": "--attention moba --block-size 128 --topk 8 --key-conv 3",
    "full seed 1": "--attention full --seed 1 --block-size 128 --topk 8",
    "128x8 hybrid": "--attention hybrid --block-size 128 --topk 8",
    "128x8 last 2 full": "--attention moba --block-size 128 --topk 8 --full-layers 2",
    "128x8 last 2 full seed 1": "--attention moba --block-size 128 --topk 8 --full-layers 2 "
    "--seed 1",
    "512x2": "--attention moba --block-size 512 --topk 2",
    "64x16 seed 1": "--attention moba --block-size 64 --topk 16 --seed 1",
    "128x8 seed 1": "--attention moba --block-size 128 --topk 8 --seed 1",
    "128x8 conv seed 1": "--attention moba --block-size 128 --topk 8 --key-conv 3 --seed 1",
    "512x8": "--attention moba --block-size 512 --topk 8",
    "128x8 sink": "--attention moba --block-size 128 --topk 8 --sink-blocks 1",
    "64x16 sub8": SUB_BLOCKS,
    "64x16 sub8 seed 1": f"{SUB_BLOCKS} --seed 1",
    "64x16 sub8 last 2 full": f"{SUB_BLOCKS} --full-layers 2",
    "64x16 sub8 last 2 full seed 1": f"{SUB_BLOCKS} --full-layers 2 --seed 1",
    "32x32 sub4": "--attention moba --block-size 32 --topk 32 --gate-block-size 4",
    # NSA beside MoBA, with a quarter of the tokens, and with one KV head for eight query heads, for
    # which its selected branch has kernels. Of 16,384 tokens, a query sees 512 compressed keys on
    # average: with 4 blocks and a window of 256, also 1,024 keys.
    "full 1 KV head": f"--attention full --block-size 64 --topk 16 {ONE_KV_HEAD}",
    "64x16 1 KV head": f"--attention moba --block-size 64 --topk 16 {ONE_KV_HEAD}",
    "nsa 1 KV head": "--attention nsa --block-size 64 --topk 4 --sink-blocks 1 --local-blocks 1 "
    f"--window 256 {ONE_KV_HEAD}",
    # The sizes of NSA's paper: 16 blocks of 64, three of them fixed, and a window of 512, which
    # with the compressed keys are 2,048 keys; and MoBA with as many.
    "nsa 64x16 1 KV head": "--attention nsa --block-size 64 --topk 16 --sink-blocks 1 "
    f"--local-blocks 1 --window 512 {ONE_KV_HEAD}",
    "64x32 1 KV head": f"--attention moba --block-size 64 --topk 32 {ONE_KV_HEAD}",
    # Twice the length: at equal numbers of tokens, and longer, by the speeds at 16K for about the
    # time of full attention.
    "full 32K": f"--attention full --block-size 128 --topk 8 {HALF}",
    "128x8 hybrid 32K": f"--attention hybrid --block-size 128 --topk 8 {HALF}",
    "128x8 hybrid 32K longer": f"--attention hybrid --block-size 128 --topk 8 {LONG} --steps 4300",
    "full 32K seed 1": f"--attention full --block-size 128 --topk 8 {HALF} --seed 1",
    "64x16 sub8 32K longer": f"{SUB_BLOCKS} {LONG} --steps 3900",
    "64x16 sub8 32K longer seed 1": f"{SUB_BLOCKS} {LONG} --steps 3900 --seed 1",
    # Full attention is the faster one in contexts of 2,048 tokens.
    "64x16 sub8 full while short 32K": f"{SUB_BLOCKS} --full-while-short {LONG} --steps 4500",
    "64x16 sub8 full while short 32K seed 1": f"{SUB_BLOCKS} --full-while-short {LONG} "
    "--steps 4500 --seed 1",
    # As many tokens as full attention; with full attention at the end, too; and a model that trains
    # with full attention and is evaluated with sub-blocks.
    "64x16 sub8 full while short 32K half": f"{SUB_BLOCKS} --full-while-short {HALF}",
    "64x16 sub8 hybrid 32K": f"{SUB_BLOCKS} --attention hybrid --full-while-short {LONG} "
    "--steps 3900",
    "full read sub8 32K": f"{SUB_BLOCKS} --attention full {HALF}",
}
# Continued training of a pretrained model with 8K of context, at a small learning rate.
PRETRAINED = "--length 8192 --batch 8 --accumulate 4 --lr 2e-4 --to-zero --every 50"
PRETRAINED += " --windows 64 --check-windows 16"
PRETRAINED_STEPS = 400  # 26M tokens
# From 8K to 32K of context, with a larger rotary base (arXiv 2309.16039): 13M tokens.
LONGER = "--length 32768 --batch 2 --accumulate 2 --rope-base 500000 --steps 200 --windows 16"
LONGER += " --check-windows 4 --block-size 64 --topk 16 --sink-blocks 1"
PRETRAINED_RUNS = {
    "full": "--attention full --block-size 64 --topk 16 --sink-blocks 1",
    "64x16 sink": "--attention moba --block-size 64 --topk 16 --sink-blocks 1",
    "128x8 sink": "--attention moba --block-size 128 --topk 8 --sink-blocks 1",
    "64x16 sink sub8": "--attention moba --block-size 64 --topk 16 --sink-blocks 1 "
    "--gate-block-size 8",
    # As many keys, and the best of eight settings without training (docs/results.md, needles).
    "32x32 sink sub4": "--attention moba --block-size 32 --topk 32 --sink-blocks 1 "
    "--gate-block-size 4",
    "full seed 1": "--attention full --block-size 64 --topk 16 --sink-blocks 1 --seed 1",
    "32x32 sink sub4 seed 1": "--attention moba --block-size 32 --topk 32 --sink-blocks 1 "
    "--gate-block-size 4 --seed 1",
    # Evaluated with the blocks of "32x32 sink sub4".
    "full read 32x32 sub4": "--attention full --block-size 32 --topk 32 --sink-blocks 1 "
    "--gate-block-size 4",
    "64x16": "--attention moba --block-size 64 --topk 16",
    "64x16 sink hybrid": "--attention hybrid --block-size 64 --topk 16 --sink-blocks 1",
    "64x16 sink last 3 full": "--attention moba --block-size 64 --topk 16 --sink-blocks 1 "
    "--full-layers 3",
    "full 32K": f"--attention full {LONGER}",
    "64x16 sink 32K": f"--attention moba {LONGER}",
    "64x16 sink hybrid 32K": f"--attention hybrid {LONGER}",
    # About the time of "full 32K" by FlexAttention: 1.01 s for its step, 0.43 s with MoBA, on one
    # H100. By cuDNN, a step of "full 32K" takes 0.80 s.
    "64x16 sink 32K longer": f"--attention moba {LONGER} --steps 470",
    # Planned for the time of "full 32K" by cuDNN; on one H200, it took 0.95 times as long.
    "64x16 sink sub8 32K": f"--attention moba {LONGER} --gate-block-size 8 --steps 330",
    # An eighth of the keys, as 64x16 has at 8K, instead of a 32nd.
    "64x64 sink sub8 32K": f"--attention moba {LONGER} --topk 64 --gate-block-size 8",
}
TOY_MODEL = "--layers 2 --dim 64 --heads 2 --kv-heads 1 --length 256 --batch 4 --lr 3e-3"
TOY_MODEL += " --every 10 --windows 8 --check-windows 4 --device cpu"
TOY_STEPS = 40
TOY_RUNS = {
    "full": "--attention full",
    "16x4": "--attention moba --block-size 16 --topk 4",
    "16x4 conv": "--attention moba --block-size 16 --topk 4 --key-conv 3",
    "16x4 hybrid": "--attention hybrid --block-size 16 --topk 4",
    "nsa": "--attention nsa --block-size 16 --topk 4 --sink-blocks 1 --local-blocks 1 --window 16",
}
EVALUATION = 25  # seconds that a run is left after the clock, to stop and to validate
KERNELS = ("flex", "flash", "cudnn")  # of full attention


def file_of(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def smoke(o: argparse.Namespace) -> None:
    """Every configuration that this process is given makes a few steps, on random tokens."""
    sys.path.insert(0, str(HERE))
    import train

    train.TIMED = 4
    for name in o.only:
        began, found = time.monotonic(), {}
        file = o.work / "smoke" / f"{file_of(name)}.json"
        try:
            torch._dynamo.reset()
            options = [*o.options.split(), *o.runs[name].split(), "--results", str(file)]
            if o.dense:
                options += ["--dense", o.dense]
            train.main([*options, "--steps", "12", "--windows", "4", "--check-windows", "0",
                        "--every", "12", "--tokens", str(o.work / "random")])  # fmt: skip
            found = json.loads(file.read_text())
            loss = found["history"]["loss"]
            found = {"tokens_per_second": found.get("tokens_per_second"), "loss": loss}
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"[-1500:]}
        found["seconds"] = round(time.monotonic() - began, 1)
        if torch.cuda.is_available():
            found["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        (o.work / "smoke" / f"{file_of(name)}.done").write_text(json.dumps(found))


def random_tokens(folder: Path, vocabulary: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "held_out"):
        tokens = torch.randint(vocabulary, (1_000_000,), generator=generator).short()
        (folder / f"{name}.bin").write_bytes(tokens.numpy().tobytes())
    (folder / "corpus.json").write_text(json.dumps({"vocabulary": vocabulary}))


class Sweep:
    """The state of all runs, and what is written of it."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.work, self.began = o, Path(o.work), time.monotonic()
        self.status: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.gpus: list[str | None] = [None] if o.toy else gpus()
        self.have = json.loads(o.have.read_text())["runs"] if o.have else {}
        self.log = o.work / "logs"
        for folder in (o.work, self.log, o.work / "smoke", o.work / "results"):
            folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the clock stops all."""
        return self.began + 60 * float(self.o.minutes) - time.monotonic()

    def start(
        self, arguments: list[str], gpu: str | None, log: str, program: str = sys.executable
    ) -> subprocess.Popen[bytes]:
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        cache = self.o.work.absolute() / "cache"
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        environment |= {"TRITON_CACHE_DIR": str(cache / "triton")}
        if gpu is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "8"}
        path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(x for x in path if x)
        with (self.log / f"{log}.log").open("ab") as to:
            command = [program, *arguments]
            return subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, env=environment)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def write(self) -> None:
        """All that is known now, in one file."""
        about: dict[str, Any] = {"corpus": read_json(self.o.tokens / "corpus.json")}
        about["smoke"] = {
            x.stem: read_json(x) for x in sorted((self.o.work / "smoke").glob("*.done"))
        }
        runs = dict(self.have)
        for name in self.o.runs:
            found = read_json(self.o.work / "results" / f"{file_of(name)}.json")
            status = self.status.get(name, "done" if "final" in found else "stopped")
            if found or name in self.status:
                runs[name] = {"status": status} | compact(found)
                if name in self.errors:
                    runs[name]["error"] = self.errors[name]
        text = json.dumps(about | {"runs": runs})
        new = self.o.results.with_name(self.o.results.name + ".new")
        new.write_text(text + "\n")
        new.replace(self.o.results)

    def prepare(self) -> None:
        """The corpus, and meanwhile the smoke test of all configurations."""
        o = self.o
        running: list[tuple[subprocess.Popen[bytes], str]] = []
        if not (o.tokens / "corpus.json").is_file():
            size = ["--vocabulary", "1024", "--max-bytes", "4000000"] if o.toy else []
            also = ["--also", *(str(x) for x in o.also)] if o.also else []
            corpus = [str(HERE / "corpus.py"), "--out", str(o.tokens), *size, *also]
            corpus += ["--tokenizer", o.model] if o.model else []
            corpus += ["--gguf", o.gguf] if o.model and o.gguf else []
            running.append((self.start(corpus, None, "corpus"), "corpus"))
        if o.smoke:
            random_tokens(o.work / "random", 1024 if o.toy else 16384)
            first = [] if o.dense else ["full"]  # to compare kernels
            left = [x for x in [*first, *o.runs] if not self.smoked(x)]
            others = [] if o.toy or o.dense else KERNELS[1:]
            kernels = [f"full {x}" for x in others if not self.smoked(f"full {x}")]
            names = [*kernels, *dict.fromkeys(left)]
            for i, gpu in enumerate(self.gpus):
                if some := names[i :: len(self.gpus)]:
                    arguments = ["--do-smoke", "--only", *some, "--work", str(o.work)]
                    arguments += ["--results", str(o.results)] + ["--toy"] * o.toy
                    arguments += ["--dense", o.dense] if o.dense else []
                    process = self.start([__file__, *arguments], gpu, f"smoke-{i}")
                    running.append((process, "smoke"))
        smoke_end = time.monotonic() + o.smoke
        while running:
            for item in list(running):
                process, kind = item
                if process.poll() is not None:
                    running.remove(item)
                    self.say(f"{kind} ended with code {process.returncode}")
                elif kind == "smoke" and time.monotonic() > smoke_end:
                    process.kill()  # its own child, which has had its time
                    process.wait()
            time.sleep(0.2)
        for file in sorted((o.work / "smoke").glob("*.done")):
            self.say(f"smoke {file.stem}: {str(read_json(file))[:300]}")
        self.write()

    def smoked(self, name: str) -> bool:
        return (self.work / "smoke" / f"{file_of(name)}.done").is_file()

    def kernel(self) -> str:
        """Of full attention: the fastest that ran, and lost what FlexAttention lost."""
        best, speed, loss = "flex", 0.0, None
        for name in KERNELS:
            file = file_of("full" if name == "flex" else f"full {name}")
            found = read_json(self.o.work / "smoke" / f"{file}.done")
            if not found.get("tokens_per_second"):
                continue
            loss = found["loss"][-1] if loss is None else loss
            if found["tokens_per_second"] > speed and abs(found["loss"][-1] - loss) < 0.05:
                best, speed = name, found["tokens_per_second"]
        return best

    def run(self) -> None:
        """Trains all, each GPU one at a time."""
        o = self.o
        self.prepare()
        if not (o.tokens / "corpus.json").is_file():
            sys.exit(f"no corpus was made; see {self.log / 'corpus.log'}")
        file = o.work / "kernel.txt"  # the same in all sittings
        if not file.is_file():
            file.write_text(o.dense or ("flex" if o.toy else self.kernel()))
        dense = file.read_text()
        self.say(f"full attention by {dense}")
        todo = [x for x in o.runs if "final" not in self.have.get(x, {}) and not self.finished(x)]
        todo.sort(key=lambda x: not (o.work / f"{file_of(x)}.pt").is_file())  # unfinished first
        running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        if o.first:  # on the last GPU, whose runs wait for it
            self.status["first"] = "running"
            last = len(self.gpus) - 1
            running[last] = "first", self.start(o.first, self.gpus[last], "first", "/bin/sh")
        written = time.monotonic()
        while todo or running:
            for i, gpu in enumerate(self.gpus):
                if i not in running and todo and self.left() > o.least:
                    name = todo.pop(0)
                    running[i] = name, self.start(self.command(name, dense), gpu, file_of(name))
                    self.status[name] = "running"
                    self.say(f"GPU {i}: {name}")
                if i in running and running[i][1].poll() is not None:
                    name, process = running.pop(i)
                    self.ended(name, process.returncode)
                elif i in running and self.left() < -1.5 * EVALUATION:
                    running[i][1].kill()  # it should have stopped by itself
            if not running and self.left() <= o.least:
                break
            if time.monotonic() - written > 10:
                self.write()
                written = time.monotonic()
            time.sleep(0.2)
        self.write()

    def finished(self, name: str) -> bool:
        return "final" in read_json(self.o.work / "results" / f"{file_of(name)}.json")

    def ended(self, name: str, code: int) -> None:
        tail = (self.log / f"{file_of(name)}.log").read_text(errors="replace")[-1500:]
        if name == "first":
            self.status.pop(name)
            self.say(f"first ended with code {code}")
            return
        self.status[name] = "done" if self.finished(name) else "stopped" if code == 0 else "failed"
        if self.status[name] == "failed":
            self.errors[name] = tail
        found = read_json(self.o.work / "results" / f"{file_of(name)}.json")
        steps, speed = found.get("steps"), found.get("tokens_per_second", 0.0)
        self.say(f"{name}: {self.status[name]} at step {steps}, {speed:,.0f} tokens/s")
        if self.status[name] == "failed":
            print(tail, flush=True)

    def command(self, name: str, dense: str) -> list[str]:
        o, checkpoint = self.o, self.o.work / f"{file_of(name)}.pt"
        arguments = [
            str(HERE / "train.py"),
            "--results",
            str(o.work / "results" / f"{file_of(name)}.json"),
        ]
        arguments += ["--minutes", f"{max(0.01, self.left() / 60):.3f}"]
        if o.toy:
            arguments += ["--device", "cpu"]
        if checkpoint.is_file():
            return [*arguments, "--resume", str(checkpoint)]
        options = [*o.options.split(), *o.runs[name].split()]
        options += ["--model", o.model] if o.model else ["--dense", dense]
        options += ["--gguf", o.gguf] if o.model and o.gguf else []
        options += ["--save", str(o.work / "models" / file_of(name))] if o.model else []
        options += [] if "--steps" in options else ["--steps", str(o.steps)]
        options += ["--tokens", str(o.tokens), "--out", str(checkpoint)]
        return [*arguments, *options]


def compact(run: dict[str, Any]) -> dict[str, Any]:
    """The results of train.py without paths, in fewer digits, and with means of ten steps."""
    if not run:
        return run
    history, options = run["history"], dict(run["options"])
    for name in ("results", "out", "resume", "minutes", "until", "tokens", "text", "save", "model"):
        options.pop(name, None)
    seconds = list(itertools.accumulate(x[2] for x in history["times"]))
    kept = {
        "loss_of_10_steps": [statistics.fmean(x) for x in batched(history["loss"], 10)],
        "seconds": seconds,
        "compile_seconds": sum(x[2] for x in history["times"] if x[3]),
        "checks": history["checks"],
    }
    found: dict[str, Any] = rounded(run | {"options": options, "history": kept})
    return found


def batched(values: list[float], n: int) -> list[list[float]]:
    return [values[i : i + n] for i in range(0, len(values), n)]


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return round(x, 5) if isinstance(x, float) else x


def gpus() -> list[str | None]:
    count = torch.cuda.device_count()
    if not count:
        sys.exit("there is no GPU here; --toy runs on a CPU")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(shown.split(",") if shown else map(str, range(count)))]


def read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found


def summary(runs: dict[str, Any]) -> str:
    """The runs that have ended, beside the first."""
    rows = []
    for name, run in runs.items():
        if "final" in run:
            attention = run["options"]["attention"]
            x = run["final"]["full" if attention == "hybrid" else attention]
            losses = [f"{x[part]:.4f}" for part in ("loss", "first", "middle", "last")]
            copied = " ".join(f"{y:.2f}" for y in x["copied"].values())
            rows.append([name, *losses, copied, f"{run.get('tokens_per_second', 0):,.0f}"])
        else:
            rows.append([name, run["status"], str(run.get("steps", 0)), "", "", "", ""])
    heads = ["attention", "loss", "first", "middle", "last", "copied, by depth", "tokens/s"]
    return table(heads, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("sweep"), metavar="FOLDER", help="for checkpoints, the "
        "corpus and logs (%(default)s)")  # fmt: skip
    add("--results", type=Path, default=Path("sweep.json"), metavar="FILE", help="(%(default)s)")
    add("--only", nargs="+", metavar="NAME", help="of the configurations; default: all")
    add("--steps", type=positive, help=f"of each run (default {STEPS}, or {TOY_STEPS})")
    add("--minutes", type=float, default=1e6, help="stop all after so long, to go on later")
    add("--least", type=float, default=60.0, help="seconds left to start a run (%(default)s)")
    add("--smoke", type=float, default=0.0, metavar="SECONDS", help="try each first, so long")
    add("--dense", choices=KERNELS, help="kernel of full attention (default: as above)")
    add("--also", type=Path, nargs="+", default=[], metavar="FOLDER", help="more text to train on")
    add("--first", nargs="+", metavar="WORD", help="a shell script and its arguments, to run on "
        "one of the GPUs before its runs")  # fmt: skip
    add("--have", type=Path, metavar="FILE", help="results of runs that need not run again")
    add("--model", metavar="FOLDER", help="a pretrained model, to continue its training")
    add("--gguf", metavar="FILE", help="in that folder, the model as GGUF")
    add("--toy", action="store_true", help="small runs, on a CPU")
    add("--do-smoke", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    runs, o.options, steps = RUNS, MODEL, STEPS
    if o.model:
        runs, o.options, steps = PRETRAINED_RUNS, PRETRAINED, PRETRAINED_STEPS
    if o.toy:
        runs, o.options, steps = TOY_RUNS, TOY_MODEL, TOY_STEPS
    o.runs, o.tokens, o.steps = dict(runs), o.work / "tokens", o.steps or steps
    if o.model and (o.toy or o.smoke):
        parser.error("--model goes with neither --toy nor --smoke")
    if o.do_smoke:
        o.runs |= {f"full {x}": f"--attention full --dense {x}" for x in KERNELS}
        smoke(o)
        return {}
    if unknown := {*(o.only or [])} - {*o.runs}:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; try {', '.join(o.runs)}")
    o.runs = {name: x for name, x in o.runs.items() if name in (o.only or o.runs)}
    sweep = Sweep(o)
    try:
        sweep.run()
    finally:
        sweep.write()
    found = read_json(o.results)
    print(summary(found["runs"]), flush=True)
    return found


if __name__ == "__main__":
    main()
