"""Tests of transformers models with local layers, which keep their window or chunks."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.nn.attention.flex_attention import AuxOutput

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    SiglipVisionConfig,
    StaticCache,
)

from flexmoba import moba_reference
from flexmoba.hybrid import set_attention
from flexmoba.integrations.transformers import (
    FlexMobaCache,
    attach,
    attention,
    convert,
    local,
    register,
)
from flexmoba.tune import capture
from tests.conftest import assert_bitwise_equal
from tests.test_generate import assert_whole_passes_choose, generate, step
from tests.test_transformers import WAYS, check_packing, inputs_of, logits_and_gradients, packed
from tests.tiny_models import COMMON, CONFIGS, GROUPED, WINDOW, WINDOWED, model_of, tokens

LENGTH, BLOCK, TOPK = 45, 8, 2
EAGER = ("local gemma2", "local gpt_oss")  # models without sdpa, which compute softmax in float32
SINKS = "local gpt_oss"
DIFFERENT = ["local gemma2", "local gemma3", "local llama4", "local gpt_oss"]
CHUNKS = pytest.param(
    "local llama4",
    marks=pytest.mark.skipif(
        Version(version("transformers")) < Version("5.23"),
        reason="before 5.23 the chunks of transformers begin with the row, not with a document",
    ),
)


def windowed(family, **config):
    """Returns a model with its default attention."""
    dtype = torch.float32 if family in EAGER else torch.float64
    model = model_of(family, dtype=dtype, **config)
    model.set_attn_implementation("eager" if family in EAGER else "sdpa")
    for name, p in model.named_parameters():
        if name.endswith("sinks"):  # different values, which change the output clearly
            p.data.copy_(torch.linspace(-1, 3, p.numel()))
    return model


def by_definition(q, k, v, block_size, topk, *, return_aux, **options):
    out = moba_reference(q, k, v, block_size, topk, **options)
    return out, AuxOutput(lse=torch.zeros_like(q[..., 0]))


@pytest.mark.parametrize("family", WINDOWED)
def test_global_layers_alone_are_converted(family, monkeypatch):
    model, ids = windowed(family), tokens(2, LENGTH)
    dense = logits_and_gradients(model, ids)
    for topk in (None, -(-LENGTH // BLOCK)):
        convert(model, BLOCK, topk)
        torch.testing.assert_close(logits_and_gradients(model, ids), dense)
    assert [x.layer_idx for x in model.modules() if hasattr(x, "flexmoba")] == [1]

    sparse = logits_and_gradients(convert(model, BLOCK, TOPK), ids)
    assert (sparse[0] - dense[0]).abs().max() > 0.05
    if family != SINKS:  # the oracle has no sinks
        monkeypatch.setattr(attention, "flex_moba", by_definition)
        torch.testing.assert_close(logits_and_gradients(model, ids), sparse)


@pytest.mark.parametrize("family", WINDOWED)
def test_padding_is_what_it_is_to_the_model(family):
    """Tests padding on the left, on the right and between tokens, with and without positions."""
    model, ids = windowed(family), tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, 30:], mask[2, [0, 7, 8, 31]] = 0, 0, 0
    ways = [{"attention_mask": mask}]
    ways.append(ways[0] | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    dense = [model(ids, **way).logits for way in ways]
    convert(model, BLOCK, None)
    for way, expected in zip(ways, dense, strict=True):
        torch.testing.assert_close(model(ids, **way).logits[mask.bool()], expected[mask.bool()])
    convert(model, BLOCK, TOPK)
    whole = model(ids, **ways[1]).logits
    for row in range(3):
        alone = model(ids[row][mask[row].bool()][None]).logits
        if row < 2:  # padding between tokens counts in a window, so the third row differs
            torch.testing.assert_close(whole[row, mask[row].bool()], alone[0])


@pytest.mark.parametrize("way", [way for way in WAYS if way != "holes"])
@pytest.mark.parametrize("family", DIFFERENT)
def test_packed_documents_are_alone(family, way):
    model = convert(windowed(family), BLOCK, TOPK)
    # In local layers, padding attends to real tokens.
    check_packing(model, [19, 1, 13], way, use_cache=True, padding_as_well=False)


@pytest.mark.parametrize("family", [*DIFFERENT[:2], CHUNKS, SINKS])
def test_packed_documents_that_transformers_tells_apart(family):
    check_packing(convert(windowed(family), BLOCK, TOPK), [19, 26], "position_ids", use_cache=False)


@pytest.mark.parametrize("family", DIFFERENT)
def test_packed_documents_with_holes_are_alone(family):
    """Tests padding between tokens. As in the model, a window counts columns, padding included."""
    model = convert(windowed(family), BLOCK, TOPK)
    inputs, _, columns = inputs_of("holes", [19, 1, 13])
    ids = tokens(1, inputs["position_ids"].shape[1])
    whole = model(ids, **inputs).logits
    for part in columns.split([19, 1, 13]):
        mask = torch.zeros_like(ids).index_fill(1, part, 1)
        alone = model(ids, **inputs | {"attention_mask": mask}).logits
        torch.testing.assert_close(whole[:, part], alone[:, part])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["local gemma3", "local llama4"])
def test_documents_are_those_of_transformers(family, use_cache):
    """Tests jumps of positions, which begin documents only where transformers looks for them."""
    model, ids = windowed(family), tokens(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1).clone()
    positions[:, 20:] += 80
    if not use_cache:
        positions[:, 30:] = torch.arange(15)
    dense = model(ids, position_ids=positions, use_cache=use_cache).logits
    convert(model, BLOCK, None)
    actual = model(ids, position_ids=positions, use_cache=use_cache).logits
    torch.testing.assert_close(actual, dense)


def test_local_layers_share_a_mask_of_documents(monkeypatch):
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    model = windowed("local gemma3", num_hidden_layers=4, layer_types=kinds)
    convert(model, BLOCK, TOPK)
    made = []
    make = local.local_mask
    monkeypatch.setattr(local, "local_mask", lambda **x: made.append(0) or make(**x))
    ids, (positions, _, _) = tokens(1, LENGTH), packed([20, 25])
    model(ids, position_ids=positions)
    assert len(made) == 2  # the mask of transformers and the mask with documents
    model(ids, position_ids=positions, use_cache=False)
    assert len(made) == 3  # the mask of transformers already separates the documents


CACHES = {
    "dynamic": lambda config: FlexMobaCache(config=config),
    "static": lambda config: FlexMobaCache(64, config=config),
    "of transformers": lambda config: DynamicCache(config=config),
}


@pytest.mark.parametrize("family", [*WINDOWED, "local gemma3n", "local gemma4"])
def test_greedy_decoding_is_what_whole_passes_compute(family):
    model, ids = convert(windowed(family), BLOCK, TOPK), tokens(2, LENGTH)
    for chunk, make in zip((33, 7, None), CACHES.values(), strict=True):
        cache = make(model.config)
        new, logits = generate(model, ids, past_key_values=cache, prefill_chunk_size=chunk)
        assert_whole_passes_choose(model, ids, new, logits)
    assert cache.layers[0].keys.shape[2] == WINDOW - 1


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_shorter_than_the_window(cache):
    """Tests a short cache. A static cache has more keys than queries, and some are unwritten."""
    model = convert(windowed("local gemma3", sliding_window=256), BLOCK, TOPK)
    ids = tokens(2, 40)
    new, logits = generate(model, ids, past_key_values=CACHES[cache](model.config))
    assert_whole_passes_choose(model, ids, new, logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", DIFFERENT)
def test_padded_rows_decode_as_they_do_alone(family, cache):
    model, ids = convert(windowed(family), BLOCK, TOPK), tokens(2, LENGTH)
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [21]])).int()
    made = CACHES[cache](model.config)
    options = {"attention_mask": mask, "prefill_chunk_size": 33}
    new, logits = generate(model, ids * mask, past_key_values=made, **options)
    assert_whole_passes_choose(model, ids[:1], new[:1], logits[:, :1])
    assert_whole_passes_choose(model, ids[1:, 21:], new[1:], logits[:, 1:])


def test_beams_and_drafts_go_with_windows():
    model, ids = convert(windowed("local gemma3"), BLOCK, TOPK), tokens(1, 20).repeat(1, 2)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, ids, use_cache=False, **beams)
    actual = generate(model, ids, past_key_values=FlexMobaCache(config=model.config), **beams)
    assert_bitwise_equal(actual[0], expected[0])
    cache = FlexMobaCache(config=model.config)
    drafts = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 12}
    assert_whole_passes_choose(model, ids, *generate(model, ids, past_key_values=cache, **drafts))


def test_layers_that_drop_queries_see_what_they_saw():
    """Tests the last layers of Gemma 4, which share keys and drop queries for a few logits."""
    for family, window in [("local gemma4", WINDOW), ("local gemma4", 256)]:
        model, ids = convert(windowed(family, sliding_window=window), BLOCK, TOPK), tokens(2, 40)
        whole = model(ids, use_cache=False).logits
        for n in (1, 3):
            torch.testing.assert_close(model(ids, logits_to_keep=n).logits, whole[:, -n:])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("family", ["local gemma2", CHUNKS])
def test_compiled_without_a_graph_break(family):
    model, ids = convert(windowed(family), BLOCK, TOPK), tokens(1, LENGTH)
    positions, _, bounds = packed([20, 25])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = {"position_ids": positions, "cu_seq_lens_q": bounds}
    expected = model(ids, use_cache=False, **inputs).logits
    torch.testing.assert_close(compiled(ids, use_cache=False, **inputs).logits, expected)


def test_the_models_own_attention_is_what_it_was(tmp_path):
    model, ids = windowed("local gemma3"), tokens(2, LENGTH)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        for _ in range(2):  # the second call converts a converted model
            convert(model, BLOCK, [None, TOPK])
            assert model.config.flexmoba["local_attention"] == name
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    register()
    options = {"dtype": torch.float64, "attn_implementation": "flexmoba"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert [x.layer_idx for x in attach(loaded).modules() if hasattr(x, "flexmoba")] == [1]
    torch.testing.assert_close(loaded(ids).logits, expected)

    for family, name in [("local gemma3", "sdpa"), ("local gpt_oss", "eager")]:
        fresh = model_of(family)
        fresh.set_attn_implementation("flexmoba")
        with pytest.raises(ValueError, match=r"local_attention.* sdpa, eager.*got None.*convert"):
            fresh(ids)
        assert convert(fresh, BLOCK, TOPK).config.flexmoba["local_attention"] == name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["local gemma3", "local gpt_oss"])
def test_flex_attention_in_local_layers(family):
    """Tests FlexAttention, which does not build a mask of all queries and keys."""
    torch.compiler.reset()  # transformers compiles one function for the masks of all models
    model = windowed(family, head_dim=16).float().cuda()
    ids, mask = tokens(2, 200).cuda(), torch.ones(2, 200, dtype=torch.int, device="cuda")
    mask[0, :30], mask[1, 70] = 0, 0
    restarts = {"position_ids": torch.arange(200, device="cuda")[None] % 90}
    ways = [{"attention_mask": mask}, restarts, restarts | {"use_cache": False}]
    results = {}
    for name in (model.config._attn_implementation, "flex_attention"):
        model.set_attn_implementation(name)
        convert(model, BLOCK, None)
        results[name] = logits_and_gradients(model, ids)
        results[name] += [model(ids, **way).logits[mask.bool()] for way in ways]
        cache = FlexMobaCache(config=model.config)
        results[name] += generate(model, ids, attention_mask=mask, past_key_values=cache)
    expected, actual = results.values()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_schedules_change_global_layers_alone():
    model, ids = windowed("local gemma3"), tokens(2, LENGTH)
    dense = model(ids).logits
    convert(model, BLOCK, TOPK)
    set_attention(model, topk=None, layers=0)  # the first converted layer
    torch.testing.assert_close(model(ids).logits, dense)


def test_a_capture_does_not_take_local_layers_for_converted_ones():
    for window in (WINDOW, 256):
        model, ids = windowed("local gemma3", sliding_window=window), tokens(1, LENGTH)
        convert(model, BLOCK, TOPK)
        left_out = r"converted to flexmoba, in model\.layers\.0\.self_attn.*\"sdpa\""
        with pytest.raises(ValueError, match=left_out), capture(model):
            model(ids)


def test_the_text_model_of_a_larger_one():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision = SiglipVisionConfig(**sizes, num_attention_heads=4, image_size=28, patch_size=14)
    text = CONFIGS["local gemma3"]()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model, ids = Gemma3ForConditionalGeneration(config).eval(), tokens(2, LENGTH)
    dense = model(ids).logits
    convert(model, BLOCK, None)
    torch.testing.assert_close(model(ids).logits, dense)
    convert(model, BLOCK, TOPK)
    cache = FlexMobaCache(config=model.config)
    assert_whole_passes_choose(model, ids, *generate(model, ids, past_key_values=cache))


def test_a_value_for_a_local_layer_is_refused():
    model = windowed("local gemma3")
    for values in ({"topk": [3, TOPK]}, {"topk": TOPK, "eval_topk": [3, "same"]}):
        with pytest.raises(ValueError, match=r"topk must be None for layer 0, which.*got 3"):
            convert(model, BLOCK, **values)
    convert(model, BLOCK, [None, TOPK], eval_topk=["same", None])


def test_what_local_layers_do_not_have_raises():
    model, ids = windowed("local gemma3"), tokens(1, LENGTH)
    # Set in this way, FlashAttention need not be installed.
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.*set_attn_implementation.*\"sdpa\""):
        convert(model, BLOCK, TOPK)
    model.set_attn_implementation("sdpa")
    convert(model, BLOCK, TOPK)
    with pytest.raises(NotImplementedError, match=r"FlexMobaCache\(config=model\.config\)"):
        step(model, FlexMobaCache(), ids)
    with pytest.raises(NotImplementedError, match="'gemma3_text' was given a static cache of"):
        step(model, StaticCache(model.config, max_cache_len=64), ids)

    model = convert(windowed("local gpt_oss"), BLOCK, TOPK)
    expected = model(ids).logits
    model.config.flexmoba["local_attention"] = "sdpa"
    with pytest.raises(NotImplementedError, match=r'attention sinks.*"eager"'):
        model(ids)
    model.config.flexmoba["local_attention"] = "eager"
    assert_bitwise_equal(model(ids).logits, expected)


ALL_LOCAL = {name: ("sliding_window", lambda n=name: CONFIGS[n]()) for name in WINDOWED}
ALL_LOCAL["local llama4"] = "attention_chunk_size", CONFIGS["local llama4"]
ALL_LOCAL |= {
    "mistral": ("sliding_window", CONFIGS["mistral"]),
    "phimoe": ("sliding_window", CONFIGS["phimoe"]),
    "mixtral": ("sliding_window", lambda: MixtralConfig(**COMMON, **GROUPED, num_local_experts=2)),
    "qwen3_moe": ("sliding_window", lambda: Qwen3MoeConfig(
        **COMMON, **GROUPED, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, use_sliding_window=True,
    )),
    "recurrent_gemma": ("sliding_window", lambda: RecurrentGemmaConfig(
        **COMMON, **GROUPED, lru_width=32, block_types=["attention"],
    )),
}  # fmt: skip


@pytest.mark.parametrize("family", ALL_LOCAL)
def test_models_of_windows_alone_say_what_to_load(family, tmp_path):
    """Tests contexts up to the window, and models that are loaded with a longer window."""
    name, make = ALL_LOCAL[family]
    ids, config = tokens(1, LENGTH), make()
    setattr(config, name, WINDOW)
    if family in WINDOWED:
        config.layer_types = config.layer_types[:1] * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    dense = model(ids[:, :WINDOW]).logits
    convert(model, BLOCK, None)
    torch.testing.assert_close(model(ids[:, :WINDOW]).logits, dense)
    with pytest.raises(NotImplementedError, match=f"context of {LENGTH}.*{name}={LENGTH} or more"):
        model(ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: LENGTH}).eval()
    dense = loaded(ids).logits
    assert any(hasattr(x, "flexmoba") for x in convert(loaded, BLOCK, None).modules())
    torch.testing.assert_close(loaded(ids).logits, dense)
