"""Tests of generation by transformers models, with a `FlexMobaCache` and with other caches."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from flexmoba.integrations.transformers import FlexMobaCache, convert
from tests.conftest import assert_bitwise_equal
from tests.tiny_models import FAMILIES, model_of, tokens

LENGTH, BLOCK, TOPK, STEPS = 40, 8, 3, 5
CACHES = {
    "dynamic": FlexMobaCache,
    "static": lambda: FlexMobaCache(max_cache_len=64),
    "of transformers": DynamicCache,
}


def generate(model, ids: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Returns new tokens, ``(B, n)`` int64, and their logits, ``(n, B, vocabulary)``."""
    defaults = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    result = model.generate(
        ids, **defaults | options, return_dict_in_generate=True, output_logits=True
    )
    return result.sequences[:, ids.shape[1] :], torch.stack(result.logits)


def assert_whole_passes_choose(model, ids: Tensor, new: Tensor, logits: Tensor) -> None:
    """Asserts that passes over all tokens give the same logits, and select the same new tokens."""
    whole = model(torch.cat([ids, new], 1), use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(logits.transpose(0, 1), whole.float())  # generate returns float32
    assert_bitwise_equal(new, whole.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_what_whole_passes_compute(family):
    model, ids = convert(model_of(family), BLOCK, TOPK), tokens(2, LENGTH)
    for make in CACHES.values():
        cache = make()
        new, logits = generate(model, ids, past_key_values=cache)
        assert cache.get_seq_length() == LENGTH + STEPS - 1
        assert_whole_passes_choose(model, ids, new, logits)
    convert(model, BLOCK, None)
    dense = model(torch.cat([ids, new], 1)).logits[:, LENGTH - 1 : -1]
    assert (dense - logits.transpose(0, 1)).abs().max() > 0.1  # so that the comparison can fail


@pytest.mark.parametrize("cache", CACHES)
def test_sub_blocks_decode_as_they_do_in_whole_passes(cache):
    model, ids = convert(model_of("llama"), BLOCK, TOPK, gate_block_size=2), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    new, logits = generate(model, ids, attention_mask=mask, past_key_values=CACHES[cache]())
    for row in range(2):
        here, real = slice(row, row + 1), mask[row].bool()
        assert_whole_passes_choose(model, ids[here, real], new[here], logits[:, here])
    whole = model(ids).logits
    assert not torch.allclose(convert(model, BLOCK, TOPK)(ids).logits, whole)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_add_them_once(family, cache):
    model, ids = convert(model_of(family), BLOCK, TOPK), tokens(2, LENGTH)
    new, logits = generate(model, ids, past_key_values=CACHES[cache](), prefill_chunk_size=33)
    assert_whole_passes_choose(model, ids, new, logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3n"])
def test_autocast_decodes_in_half_precision(family, cache):
    model, ids = convert(model_of(family, dtype=torch.float32), BLOCK, None), tokens(2, LENGTH)
    cache = CACHES[cache]()
    exact = model(ids).logits[:, 20:]
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(ids).logits[:, 20:]
        step(model, cache, ids[:, :20])
        steps = [step(model, cache, ids[:, i : i + 1]) for i in range(20, LENGTH)]
    rounding = (whole - exact).abs().mean()
    assert (torch.cat(steps, 1) - whole).abs().mean() < 2 * rounding
    if isinstance(cache, FlexMobaCache):
        assert cache.layers[0]._cache.k.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [None, 7, 33])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padded_rows_decode_as_they_do_alone(family, cache, chunk):
    model, ids = convert(model_of(family), BLOCK, TOPK), tokens(3, LENGTH)
    lengths = torch.tensor([LENGTH, LENGTH - 21, LENGTH - 6])
    mask = (torch.arange(LENGTH) >= LENGTH - lengths[:, None]).int()
    options = {"prefill_chunk_size": chunk, "attention_mask": mask, "max_new_tokens": 3}
    new, logits = generate(model, ids * mask, past_key_values=CACHES[cache](), **options)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        assert_whole_passes_choose(model, ids[here, -length:], new[here], logits[:, here])


@pytest.mark.parametrize("cache", CACHES)
def test_prompts_with_padding_between_tokens_decode_as_they_do_without(cache):
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, [3, 20, 21, 22]] = mask[1, 5:12] = 0
    new, logits = generate(model, ids, attention_mask=mask, past_key_values=CACHES[cache]())
    for row in range(2):
        here, real = slice(row, row + 1), mask[row].bool()
        assert_whole_passes_choose(model, ids[here, real], new[here], logits[:, here])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2, "prefill_chunk_size": 9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_beams_and_samples_are_those_of_whole_passes(options):
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(2, LENGTH)
    torch.manual_seed(0)
    whole = options | {"use_cache": False, "prefill_chunk_size": None}
    expected = generate(model, ids, **whole)
    for make in CACHES.values():
        torch.manual_seed(0)
        actual = generate(model, ids, past_key_values=make(), **options)
        assert_bitwise_equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("cache", ["dynamic", "of transformers"])
@pytest.mark.parametrize("draft", ["assistant", "prompt lookup"])
def test_assisted_decoding_is_greedy_decoding(draft, cache):
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(1, LENGTH).repeat(1, 2)
    if draft == "assistant":
        assistant = model_of("llama", dtype=torch.float32)  # dense, so it agrees only sometimes
        assistant.generation_config = GenerationConfig(num_assistant_tokens=5, pad_token_id=0)
        options = {"assistant_model": assistant}
    else:
        options = {"prompt_lookup_num_tokens": 4}
    made = CACHES[cache]()
    cropped = []
    made.crop = lambda n: (cropped.append(n), type(made).crop(made, n))
    actual = generate(model, ids, past_key_values=made, max_new_tokens=12, **options)
    assert_whole_passes_choose(model, ids, *actual)
    assert min(cropped) < 0


def step(model, cache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_cached_in_inference_mode_is_gone_on_from(beams, cache):
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(2, LENGTH)
    options = {"num_beams": beams}
    expected = generate(model, ids, use_cache=False, **options)[0]
    cache = CACHES[cache]()
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
        cache.batch_repeat_interleave(beams)
    assert_bitwise_equal(generate(model, ids, past_key_values=cache, **options)[0], expected)


@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_crop_reset_and_rows(max_cache_len):
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(3, LENGTH)
    cache = FlexMobaCache(max_cache_len)
    whole = step(model, cache, ids)
    for left in (LENGTH - 1, LENGTH - 13, 3):
        cache.crop(left - cache.get_seq_length())
        assert cache.get_seq_length() == left
        torch.testing.assert_close(step(model, cache, ids[:, left:]), whole[:, left:])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(step(model, cache, ids), whole)

    for change, rows in [
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda: cache.batch_repeat_interleave(2), [2, 2, 0, 0, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([1, 4])), [2, 0]),
    ]:
        change()
        more = tokens(len(rows), 5, seed=1)
        expected = model(torch.cat([ids[rows], more], 1)).logits[:, -5:]
        torch.testing.assert_close(step(model, cache, more), expected)
        cache.crop(-5)


def test_a_step_reads_selected_blocks_only():
    model, ids = convert(model_of("llama"), BLOCK, 1, sink_blocks=0), tokens(1, LENGTH)
    cache = FlexMobaCache()
    step(model, cache, ids)
    for layer in cache.layers:  # NaN in all blocks but the own block
        layer._cache.k[:, :, : LENGTH // BLOCK * BLOCK] = torch.nan
    assert step(model, cache, ids[:, :1]).isfinite().all()


def test_a_compiled_step_compiles_once():
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(2, LENGTH + STEPS)
    expected = model(ids).logits
    cache = FlexMobaCache(max_cache_len=64)
    step(model, cache, ids[:, :LENGTH])
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for i in range(LENGTH, LENGTH + STEPS):
            logits = compiled(ids[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, i])
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generate_compiles_its_steps_once(device):
    model = convert(model_of("llama", dtype=torch.float32), BLOCK, TOPK).to(device)
    ids = tokens(2, LENGTH).to(device)
    if device == "cpu":  # where generate does not compile by default
        options = {"compile_config": CompileConfig(backend="eager", mode=None, fullgraph=True)}
        options["compile_config"]._compile_all_devices = True
    else:
        options = {}
    cache = FlexMobaCache(max_cache_len=64)
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(2):  # the second prompt is one token shorter, and so fills blocks later
            prompt = ids[:, shift:]
            new, logits = generate(model, prompt, past_key_values=cache, **options)
            expected = generate(model, prompt, past_key_values=FlexMobaCache())
            assert_bitwise_equal(new, expected[0])
            torch.testing.assert_close(logits, expected[1], rtol=1e-3, atol=1e-3)
            cache.reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_a_cache_cannot_do_raises():
    dense, ids = model_of("llama"), tokens(1, LENGTH)
    cache = FlexMobaCache()
    step(dense, cache, ids)
    with pytest.raises(RuntimeError, match="did not reach flexmoba's attention"):
        step(dense, cache, ids[:, :1])

    model = convert(dense, BLOCK, TOPK)
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        step(model, cache, ids[:, :1])
    cache.reset()
    with pytest.raises(NotImplementedError, match="no_grad"):
        model(ids, past_key_values=cache)
    cache.reset()
    with pytest.raises(NotImplementedError, match="'llama' was given a static cache of"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="'llama' was given a static cache of"):
        step(model, StaticCache(model.config, max_cache_len=64), ids)  # raises in the prefill
    with (
        pytest.raises(NotImplementedError, match="'llama' was given packed documents with 40"),
        torch.no_grad(),
    ):
        model(ids, position_ids=torch.arange(LENGTH)[None] % 20, past_key_values=cache)
    cache.reset()

    step(model, cache, ids)
    moba = model.model.layers[0].self_attn.flexmoba
    moba.options["gate_block_size"] = 4
    with pytest.raises(ValueError, match="sub-blocks of 8 keys, but the layer has gate_block_size"):
        step(model, cache, ids[:, :1])
    moba.block_size = 16
    with pytest.raises(ValueError, match="blocks of 8 keys, but the layer has block_size=16"):
        step(model, cache, ids[:, :1])
    for bad, error, text in [
        (lambda: cache.crop(3), ValueError, "negative number, got 3"),
        (lambda: cache.crop(-100), ValueError, r"crop\(-100\)"),
        (lambda: FlexMobaCache(0), ValueError, "got 0"),
    ]:
        with pytest.raises(error, match=text):
            bad()

    convert(model, BLOCK, TOPK, impl="portable")
    with pytest.raises(NotImplementedError, match="a cache does not support impl='portable'"):
        step(model, FlexMobaCache(), ids)
    padded = FlexMobaCache()
    convert(model, BLOCK, TOPK)
    with torch.no_grad():
        model(ids, attention_mask=(torch.arange(LENGTH) > 5)[None], past_key_values=padded)
    with pytest.raises(NotImplementedError, match="came with padding"):
        padded.crop(-1)

    with pytest.raises(NotImplementedError, match="'diffllama' changes keys or values"):
        step(convert(model_of("diffllama"), BLOCK, TOPK), FlexMobaCache(), ids)
    with pytest.raises(NotImplementedError, match="not the states of recurrent layers or conv"):
        step(convert(model_of("lfm2"), BLOCK, TOPK), FlexMobaCache(), ids)
    with pytest.raises(NotImplementedError, match="several layers of this model share its keys"):
        step(convert(model_of("gemma3n"), 128, TOPK, gate="tile"), FlexMobaCache(), ids)


def test_windows_shorter_than_what_is_cached_raise():
    ids = tokens(1, LENGTH)
    windowed = convert(model_of("mistral", sliding_window=LENGTH), BLOCK, TOPK)
    for made in (FlexMobaCache(), DynamicCache(config=windowed.config)):
        step(windowed, made, ids)
        with pytest.raises(NotImplementedError, match=f"'mistral'.*{LENGTH} tokens"):
            step(windowed, made, ids[:, :1])
    with pytest.raises(NotImplementedError, match="context of 64"):
        step(windowed, FlexMobaCache(64), ids)
    # Only the masks of this model have a window.
    windowed = model_of("phimoe", sliding_window=LENGTH, dtype=torch.float32)
    cache = FlexMobaCache(64)
    step(convert(windowed, BLOCK, TOPK), cache, ids)
    with pytest.raises(NotImplementedError, match=f"'phimoe'.*{LENGTH} tokens.*of {LENGTH + 1}"):
        step(windowed, cache, ids[:, :1])
