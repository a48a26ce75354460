"""Make a corpus of tokens from the text of installed packages: long, and with no download.

Sources, headers and documentation of every project are joined in the order of their paths, so that
a context of many thousand tokens sees one project: its functions are defined in one file and called
in another, far back. Some projects are held out, to validate on. A BPE vocabulary is trained on a
sample of the rest.

The folder --out then holds

  train.bin, held_out.bin    tokens, 16 bits each, one project after the other
  tokenizer.json             the vocabulary, for the package `tokenizers`
  corpus.json                how many tokens and bytes, of which projects

and `train.py --tokens FOLDER` trains on it. The same files give the same corpus.

toy size, half a minute on a CPU:
  python examples/corpus.py --out corpus --vocabulary 1024 --max-bytes 4000000

full size, two minutes on many cores (`pip install tokenizers`):
  python examples/corpus.py --out corpus --also /usr/include

with the tokenizer of a pretrained model, to continue its training:
  python examples/corpus.py --out corpus --tokenizer ./smollm2
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexmoba.reporting import positive

ENDINGS = {
    *(".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".inl"),
    *(".rst", ".md", ".txt", ".f", ".f90", ".js", ".ts", ".cmake", ".proto"),
}
NAMES = {"METADATA"}  # of a wheel: its README
HELD_OUT = ["aiohttp", "networkx", "onnx", "optax", "pandas", "rich", "skimage", "statsmodels"]
LARGEST, LONGEST_LINE, DIGITS = 1_000_000, 2000, 0.2  # beyond these, a file is data and no text
SAMPLE = 48_000_000  # bytes that the vocabulary is trained on


def text_of(path: Path) -> str | None:
    """The text of a file, or None if it is none, or a table of numbers."""
    try:
        if not 0 < path.stat().st_size <= LARGEST:
            return None
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    if max(map(len, text.split("\n"))) > LONGEST_LINE:
        return None
    return None if sum(map(text.count, "0123456789")) > DIGITS * len(text) else text


def files_of(root: Path) -> Iterator[tuple[str, Path]]:
    """The project and the path of each file of text below a folder, in a fixed order."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(x for x in folders if x not in ("__pycache__", "site-packages"))
        for name in sorted(files):
            path = Path(folder, name)
            if (path.suffix in ENDINGS or name in NAMES) and not path.is_symlink():
                first, *rest = path.relative_to(root).parts
                project = first if rest else root.name  # a file alone is of the whole folder
                yield "dist-info" if project.endswith(".dist-info") else project, path


def projects(roots: list[Path], most: int) -> dict[str, list[str]]:
    """The files of each project, each with its name before it; none twice."""
    found: dict[str, list[str]] = {}
    seen, total = set(), 0
    for root in roots:
        for project, path in files_of(root):
            text = text_of(path)
            digest = hashlib.sha256((text or "").encode()).digest()
            if text is None or digest in seen:
                continue
            seen.add(digest)
            found.setdefault(project, []).append(f"# {path.relative_to(root)}\n{text.strip()}\n\n")
            total += len(text)
            if total > most:
                return found
    return found


def train_vocabulary(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE, trained on files drawn evenly, up to `SAMPLE` bytes of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every = max(1, -(-sum(map(len, texts)) // SAMPLE))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts[::every], trainer)
    return tokenizer


def tokenizer_of(o: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a pretrained model."""
    import pretrained  # needs transformers

    tokenizer: Tokenizer = pretrained.tokenizer_of(o.tokenizer, o.gguf).backend_tokenizer
    if tokenizer.get_vocab_size() > 65536:
        sys.exit(f"--tokenizer {o.tokenizer}: {tokenizer.get_vocab_size():,} tokens do not fit in "
                 "16 bits")  # fmt: skip
    return tokenizer


def write(tokenizer: Tokenizer, texts: list[str], file: Path) -> int:
    """Tokens of the texts, one after the other; how many."""
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    total = 0
    with file.open("wb") as to:
        for i in range(0, len(texts), 1024):
            for x in encode(texts[i : i + 1024], add_special_tokens=False):
                to.write(np.array(x.ids, dtype=np.uint16).tobytes())
                total += len(x.ids)
    return total


def main(argv: list[str] | None = None) -> dict[str, object]:
    o = parse(argv)
    began = time.perf_counter()
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths += [x for x in sys.path if x.endswith(("site-packages", "dist-packages"))]
    roots = o.roots or [*map(Path, dict.fromkeys(os.path.realpath(x) for x in paths))]
    found = projects([x for x in [*roots, *o.also] if x.is_dir()], o.max_bytes)
    held = {name: found.pop(name) for name in o.held_out if name in found}
    if not held and len(found) > 1:  # none of those is installed: a twelfth, by the names' hashes
        shuffled = sorted(found, key=lambda x: hashlib.sha256(x.encode()).digest())
        held = {name: found.pop(name) for name in shuffled[: -(-len(found) // 12)]}
    for name, files in list(found.items())[: not held]:  # one alone: its last files
        held = {f"{name} (last files)": files[-(len(files) // 12) or len(files) :]}
        found = {name: files[: -(len(files) // 12)]}
    if not any(held.values()) or not any(found.values()):
        sys.exit(f"there is no text in {', '.join(map(str, roots))}")
    seen, unseen = ([x for files in y.values() for x in files] for y in (found, held))
    print(f"{len(seen):,} files of {len(found)} projects, {sum(map(len, seen)):,} characters; held "
          f"out: {len(unseen):,} files of {', '.join(held)}, {sum(map(len, unseen)):,} "
          f"({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
    tokenizer = tokenizer_of(o) if o.tokenizer else train_vocabulary(seen, o.vocabulary)
    print(
        f"{tokenizer.get_vocab_size():,} tokens ({time.perf_counter() - began:.0f} s)", flush=True
    )
    o.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(o.out / "tokenizer.json"))
    report: dict[str, object] = {"vocabulary": tokenizer.get_vocab_size()}
    for name, texts in (("train", seen), ("held_out", unseen)):
        tokens = write(tokenizer, texts, o.out / f"{name}.bin")
        size = sum(len(x.encode()) for x in texts)
        report |= {f"{name}_tokens": tokens, f"{name}_bytes": size, f"{name}_files": len(texts)}
    for name, parts in (("train", found), ("held_out", held)):
        sizes = {project: sum(map(len, files)) for project, files in parts.items()}
        most = sorted(sizes.items(), key=lambda x: -x[1])[:40]
        report[f"{name}_projects"] = dict(most)
    (o.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")  # last: it is complete
    print(f"{report['train_tokens']:,} tokens to train on, {report['held_out_tokens']:,} held out "
          f"({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the corpus goes")
    add("--roots", type=Path, nargs="+", metavar="FOLDER", help="of projects, a folder or file "
        "each (default: the standard library and the installed packages)")  # fmt: skip
    add("--also", type=Path, nargs="+", default=[], metavar="FOLDER", help="more of them")
    add("--held-out", nargs="+", default=HELD_OUT, metavar="PROJECT", help="%(default)s")
    add("--vocabulary", type=positive, default=16384, help="at most 32768 (%(default)s)")
    add("--tokenizer", metavar="FOLDER", help="of a model of transformers, in place of a new one")
    add("--gguf", metavar="FILE", help="in that folder, the model as GGUF")
    add("--max-bytes", type=positive, default=1_000_000_000, help="of text (%(default)s)")
    o = parser.parse_args(argv)
    if not 256 <= o.vocabulary <= 32768:
        parser.error(f"--vocabulary {o.vocabulary} must lie between 256 and 32768")
    if o.tokenizer and not Path(o.tokenizer).is_dir():
        parser.error(f"--tokenizer {o.tokenizer}: there is no such folder; nothing is downloaded")
    return o


if __name__ == "__main__":
    main()
