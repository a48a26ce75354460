"""Tests of the vLLM plugin with the real engine on CPU; `make vllm` runs them.

The models are converted here, and vLLM runs in an environment of its own, whose Python is named by
``FLEXMOBA_VLLM_PYTHON``, because it needs another version of transformers.
"""

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from flexmoba.integrations.transformers import convert
from tests.servers import running

PYTHON = os.environ.get("FLEXMOBA_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; run make vllm"),
]
ROOT = Path(__file__).parent.parent
STEPS, LONGEST = 12, 2048
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "",
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": LONGEST,
    "max_num_batched_tokens": 256,  # so that prompts come in chunks, together with steps
    "max_num_seqs": 8,
    "attention_backend": "CUSTOM",
}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def llama(**changes):
    """Returns a small random model, whose tokens depend on attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
            "max_position_embeddings": LONGEST, "initializer_range": 0.2, "eos_token_id": 0,
            "bos_token_id": 0, "pad_token_id": 0,
        }
        | changes
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma():
    """Returns a small random model with a layer of sliding windows."""
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=LONGEST,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def prompts(block: int, seed: int = 1) -> list[list[int]]:
    """Draws prompts of mixed lengths, two of which share a prefix of two blocks and some tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(1, 512, (n,), generator=generator).tolist()

    prefix = draw(2 * block + 9)
    lengths = (5, 40, 3 * block + block // 2, min(LONGEST - 100, 9 * block))
    return [*(draw(n) for n in lengths), prefix + draw(3), prefix + draw(70)]


def assert_greedy(model, inputs: list[list[int]], new: list[list[int]]) -> None:
    """Asserts that passes over all tokens select the same new tokens, as in `generate`."""
    for prompt, tokens in zip(inputs, new, strict=True):
        assert len(tokens) == STEPS
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens


def run(model: str, rounds: list[list[list[int]]], **options) -> list[dict]:
    """Runs the engine, and returns a dictionary for each round."""
    request = {"model": model, "rounds": rounds, "max_tokens": STEPS}
    request["options"] = {"skip_tokenizer_init": True, **OPTIONS, **options}
    result = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "vllm_engine.py")],
        input=json.dumps(request),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [x.removeprefix("RESULT ") for x in result.stdout.splitlines() if "RESULT " in x]
    if len(lines) < len(rounds):
        raise RuntimeError(result.stdout + result.stderr)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("block", "topk", "options"),
    [
        (64, [3, None], {"sink_blocks": 0}),
        (128, [3, 2], {"gate": "group", "sink_blocks": 1}),
        (256, [9, 9], {"eval_topk": [3, 3], "sink_blocks": 1, "local_blocks": 1}),
        (512, [2, 2], {"sink_blocks": 0}),
        (64, [3, 3], {"gate_block_size": 4, "sink_blocks": 1}),
        (128, [3, 4], {"gate_block_size": [16, None], "gate": "group", "sink_blocks": 0}),
    ],
)
def test_tokens_equal_those_of_generate(tmp_path, block, topk, options):
    model = convert(llama(), block, topk, **options)
    inputs = prompts(block)
    first, again = run(saved(model, tmp_path), [inputs, inputs], block_size=block)
    assert_greedy(model, inputs, first["tokens"])
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": 512}  # of no token
    expected = model.generate(torch.tensor(inputs[2:3]), **options)
    assert inputs[2] + first["tokens"][2] == expected[0].tolist()
    assert again["tokens"] == first["tokens"]
    assert again["cached"][:3] == [len(x) // block * block for x in inputs[:3]]
    with pytest.raises(AssertionError):  # so that the comparison can fail
        assert_greedy(convert(model, block, None), inputs, first["tokens"])


def test_preempted_requests_return_with_the_same_tokens(tmp_path):
    model, inputs = convert(llama(), 64, 3, sink_blocks=0), prompts(64)
    inputs += [x[:250] for x in prompts(64, seed=2)[2:]]
    options = {"block_size": 64, "num_gpu_blocks_override": 17, "max_model_len": 1024}
    (result,) = run(saved(model, tmp_path), [inputs], **options)
    assert_greedy(model, inputs, result["tokens"])
    assert result["preemptions"] > 0


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": False}, {"tensor_parallel_size": 2}],
    ids=["compiled", "two ranks"],
)
def test_compiled_and_divided_models(tmp_path, options):
    model, inputs = convert(llama(), 64, 3, sink_blocks=0), prompts(64)
    (result,) = run(saved(model, tmp_path), [inputs], block_size=64, **options)
    assert_greedy(model, inputs, result["tokens"])


@pytest.mark.parametrize(
    ("topk", "settings", "options", "text"),
    [
        (3, {}, {"attention_backend": None}, "the attention backend is none; pass --attention-b"),
        (3, {}, {"block_size": 128}, "one block of 64 tokens, got --block-size 128; pass --block-"),
        (3, {}, {"kv_cache_dtype": "fp8"}, "does not support kv_cache_dtype=fp8"),
        (3, {"impl": "portable"}, {}, "pages do not support impl='portable'; convert the model"),
        (3, {"block_size": 128, "gate": "tile"}, {"block_size": 128}, "support gate='tile'; conve"),
        (3, {"make": gemma}, {}, "does not support a sliding window in vLLM; omit the option of"),
        (3, {}, {"speculative_config": NGRAMS}, "does not support speculative decoding in vLLM"),
        (None, None, {}, "the config of the model has no flexmoba settings; convert the model"),
    ],
)  # fmt: skip
def test_start_up_raises_if_the_model_cannot_be_served(tmp_path, topk, settings, options, text):
    given = {"make": llama, "block_size": 64, "topk": topk} | (settings or {})
    model = given.pop("make")()
    if settings is not None:
        convert(model, **given)
    with pytest.raises(RuntimeError, match=text):
        run(saved(model, tmp_path), [prompts(64)], **{"block_size": 64, **options})


def test_other_models_run_as_without_the_plugin(tmp_path):
    model, inputs = llama(hidden_size=256), prompts(64)  # vLLM on CPU needs a head dim of 32
    (result,) = run(saved(model, tmp_path), [inputs], attention_backend=None)
    assert_greedy(model, inputs, result["tokens"])


def test_the_server_answers_over_http(tmp_path):
    model, inputs = convert(llama(), 64, 3, sink_blocks=0), prompts(64)
    folder = saved(model, tmp_path)
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST)]
    options += ["--block-size", "64", "--skip-tokenizer-init", "--max-num-batched-tokens", "256"]
    # The module of `vllm serve`, because that command does not find the version of vllm-cpu.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--attention-backend", "CUSTOM", "--host", "127.0.0.1"]
    with running(command + options, ENVIRONMENT) as address:
        body = {"model": folder, "prompt": inputs, "max_tokens": STEPS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "detokenize": False}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
    assert_greedy(model, inputs, [choice["token_ids"] for choice in answer["choices"]])
