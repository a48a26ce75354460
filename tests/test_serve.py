"""Tests of `flexmoba serve`: errors, and answers of transformers' server over HTTP."""

import json
import sys
import urllib.request

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmoba.commands.cli import main
from flexmoba.integrations.transformers import convert, serve
from tests.servers import running
from tests.tiny_models import VOCABULARY, model_of

SERVER = ("fastapi", "uvicorn", "openai")  # of flexmoba[serve]


def save(model, folder) -> str:
    """Saves a model with a tokenizer of one word for each token."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", eos_token="w0"
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gate_block_size": 2}])
def test_the_server_answers_with_the_tokens_of_generate(tmp_path, options):
    for name in SERVER:
        pytest.importorskip(name)
    model = convert(model_of("llama", dtype=torch.float32), 8, 3, sink_blocks=0, **options)
    folder = save(model, tmp_path)
    ids = torch.randint(1, VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 90:]
    prompt = " ".join(f"w{i}" for i in ids[0].tolist())
    body = {"model": folder, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    command = [sys.executable, "-m", "flexmoba", "serve", folder, "--device", "cpu"]
    command += ["--num-blocks", "64", "--max-batch-tokens", "40", "--host", "127.0.0.1"]
    with running(command) as address:
        request = urllib.request.Request(
            f"{address}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"].split()
    assert text == [f"w{i}" for i in expected.tolist() if i != 0]  # 0 is a special token
    assert len(text) > 3


def test_errors(tmp_path, capsys):
    folder = save(model_of("llama", dtype=torch.float32), tmp_path)
    with pytest.raises(ValueError, match="no flexmoba settings; convert the model"):
        serve(folder)
    with pytest.raises(SystemExit) as error:
        main(["serve", folder, "--device", "cpu"])
    assert error.value.code == 2
    assert f"flexmoba: error: the config of {folder} has no flexmoba" in capsys.readouterr().err


def test_settings_that_pages_do_not_support_raise_at_start_up(tmp_path):
    for name in SERVER:
        pytest.importorskip(name)
    model = convert(model_of("llama", dtype=torch.float32), 8, 3, sink_blocks=0, impl="portable")
    with pytest.raises(NotImplementedError, match="impl='portable'"):
        serve(save(model, tmp_path), device="cpu", non_blocking=True)
