"""Tests of transformers models with ``attn_implementation="flexmoba"``, without a `FlexMobaCache`.

They cover logits, padding, packing and training. `test_generate.py` tests the cache.
"""

import inspect
from importlib.metadata import version

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    DataCollatorWithFlattening,
    DeepseekV4Config,
    DeepseekV32Config,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from flexmoba.integrations.transformers import attach, convert, register
from flexmoba.integrations.transformers.masks import padding_mask
from flexmoba.nn import FlexMoba
from tests.conftest import assert_bitwise_equal
from tests.tiny_models import FAMILIES, HIDING, SIZES, VOCABULARY, model_of, register_oracle, tokens

LENGTH, BLOCK, TOPK = 45, 8, 3
# Newer versions of transformers have renamed it to activation checkpointing, and warn.
old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

drops_queries = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"),
    reason="before 5.23 Gemma 4 has all queries in every layer",
)


def logits_and_gradients(model, ids, **inputs) -> list[Tensor]:
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False, **inputs)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_is_the_oracle_and_all_blocks_are_dense_attention(family):
    model, ids = model_of(family), tokens(2, LENGTH)
    if family != "gemma2":
        model.set_attn_implementation("sdpa")
    dense = logits_and_gradients(model, ids)
    register_oracle()
    model.set_attn_implementation("oracle")
    oracle = logits_and_gradients(model, ids, block_size=BLOCK, topk=TOPK, sink_blocks=1)
    assert (oracle[0] - dense[0]).abs().max() > 0.1  # so that the next comparison can fail

    names = [name for name, _ in model.named_parameters()]
    assert convert(model, BLOCK, TOPK) is model
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(logits_and_gradients(model, ids), oracle)
    for topk in (-(-LENGTH // BLOCK), None):
        convert(model, BLOCK, topk)
        for actual, expected in zip(logits_and_gradients(model, ids), dense, strict=True):
            # Only eager attention has a cap. It computes the softmax in float32.
            dtype = torch.float32 if family == "gemma2" else torch.float64
            torch.testing.assert_close(actual.to(dtype), expected.to(dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_autocast_gives_attention_half_precision_as_elsewhere(family):
    """Rotary embeddings return float32 queries and keys, and a cache holds some or all of them."""
    model, ids = model_of(family, dtype=torch.float32), tokens(2, LENGTH)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(ids).logits
        cached = convert(model, BLOCK, None)(ids).logits
        out = model(ids, labels=ids, use_cache=False)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)
    rounding = (dense - exact).abs().mean()
    assert (out.logits - dense).abs().mean() < 2 * rounding
    assert_bitwise_equal(cached, out.logits)
    assert_bitwise_equal(compiled.logits, out.logits)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_layer_and_mode_has_its_own_topk():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    dense = convert(model, BLOCK, None)(ids).logits
    full = convert(model, BLOCK, [2, None], eval_topk=[None, "same"])
    torch.testing.assert_close(full(ids).logits, dense)
    layers = [layer.self_attn for layer in model.model.layers]
    mixed = model.train()(ids).logits
    assert (mixed - dense).abs().max() > 0.1
    layers[0].flexmoba.topk = None
    torch.testing.assert_close(model(ids).logits, dense)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=5)
def test_padding_does_not_matter(lengths, block_size, topk, seed):
    model = convert(model_of("qwen3"), block_size, topk, sink_blocks=min(1, topk - 1))
    check_padding(model, lengths, seed, positions_from="the row")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter_to_any_family(family):
    check_padding(
        convert(model_of(family), BLOCK, TOPK), [45, 30], seed=0, positions_from="the first token"
    )


def check_padding(model, lengths, seed, *, positions_from):
    width = max(lengths) + 2
    place = torch.arange(width)
    ids = tokens(len(lengths), width, seed)
    generator = torch.Generator().manual_seed(seed)
    for side in ("left", "right", "holes"):
        inputs, real = ids.clone(), []
        for row, length in enumerate(lengths):
            rank = place if side == "right" else width - 1 - place
            if side == "holes":
                rank = torch.randperm(width, generator=generator)
            real.append(rank < length)
            inputs[row, real[row]] = ids[row, :length]
        mask = torch.stack(real)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if positions_from == "the row":
            positions = place.expand_as(mask)
        logits = model(inputs, attention_mask=mask.int(), position_ids=positions).logits
        for row, length in enumerate(lengths):
            here = positions[row, mask[row]][None]
            alone = model(ids[row : row + 1, :length], position_ids=here).logits
            torch.testing.assert_close(logits[row, mask[row]], alone[0])
        other = torch.where(mask, inputs, VOCABULARY - inputs)
        again = model(other, attention_mask=mask.int(), position_ids=positions).logits
        assert_bitwise_equal(again[mask], logits[mask])


def test_padding_between_real_tokens_is_what_other_attentions_take_it_for():
    model, ids = model_of("llama").train(), tokens(2, LENGTH)
    model.set_attn_implementation("sdpa")
    mask = torch.ones_like(ids)
    mask[0, [4, 17, 18]] = mask[1, :9] = mask[1, 30] = 0

    def results():
        model.zero_grad()
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.logsumexp(-1).sum().backward()
        return [logits, *(p.grad.clone() for p in model.parameters())]

    expected = results()
    convert(model, BLOCK, None)
    torch.testing.assert_close(results(), expected)


def prefix_of(model, length):
    """Returns learned keys and values of every layer, and a function that makes a cache of them."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    shape = config.num_hidden_layers, 2, config.num_key_value_heads, length, config.head_dim
    learned = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    def cache(rows):
        made = DynamicCache()
        for i, (key, value) in enumerate(learned):
            made.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), i)
        return made

    return learned, cache


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefix_tuning_of_padded_rows(side):
    """Trains a prefix of keys. Padding on the left then lies between prefix and tokens."""
    model, ids = model_of("qwen3"), tokens(2, LENGTH)
    model.set_attn_implementation("sdpa")
    learned, cache = prefix_of(model, 6)
    padding = slice(None, 21) if side == "left" else slice(LENGTH - 21, None)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, padding] = 0
    inputs = {"attention_mask": torch.nn.functional.pad(mask, (6, 0), value=1)}
    positions = (mask.cumsum(1) - 1).clamp(min=0) + 6
    real = mask.bool()

    def results():
        logits = model(ids, **inputs, position_ids=positions, past_key_values=cache(2)).logits
        return [logits[real], *torch.autograd.grad(logits[real].logsumexp(-1).sum(), learned)]

    expected = results()
    convert(model, BLOCK, None)
    torch.testing.assert_close(results(), expected)

    convert(model, BLOCK, 2)
    sparse = results()
    assert (sparse[0] - expected[0]).abs().max() > 0.1
    alone = []
    for row in range(2):
        here = real[row]
        one = model(
            ids[row : row + 1, here],
            position_ids=positions[row : row + 1, here],
            past_key_values=cache(1),
        )
        alone.append(one.logits[0])
    alone = torch.cat(alone)
    alone = [alone, *torch.autograd.grad(alone.logsumexp(-1).sum(), learned)]
    torch.testing.assert_close(sparse, alone)
    with torch.no_grad():  # which uses a MobaCache
        logits = model(ids, **inputs, position_ids=positions, past_key_values=cache(2)).logits
    torch.testing.assert_close(logits[real], sparse[0])
    convert(model, 128, 2, gate="tile")
    with pytest.raises(NotImplementedError, match="have 45 queries for 51 keys"):
        results()


def packed(lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return positions, ids, bounds


WAYS = ("position_ids", "all-ones mask", "cu_seq_lens", "seq_idx", "two rows", "padding", "holes")


def inputs_of(way, lengths):
    """Returns the inputs that describe documents, the number of rows, and the columns of tokens."""
    positions, ids, bounds = packed(lengths)
    columns = torch.arange(ids.shape[1])
    if way == "all-ones mask":
        return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}, 1, columns
    if way == "cu_seq_lens":
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
        batch = collator([{"input_ids": [0] * length} for length in lengths])
        assert_bitwise_equal(batch["cu_seq_lens_q"], bounds)
        del batch["input_ids"], batch["labels"]
        return batch, 1, columns
    if way == "seq_idx":
        # The positions do not restart, so they do not reveal the documents.
        return {"position_ids": columns[None], "seq_idx": ids.int()}, 1, columns
    if way == "two rows":
        return {"position_ids": positions}, 2, columns
    if way in ("padding", "holes"):
        columns = columns + 3 if way == "padding" else columns * 7 // 5  # 0, 1, 2, 4, 5, 7, ...
        inputs = {}
        for name, x in [("position_ids", positions), ("attention_mask", torch.ones_like(ids))]:
            inputs[name] = torch.zeros(1, int(columns[-1]) + 3, dtype=x.dtype)
            inputs[name][:, columns] = x
        return inputs, 1, columns
    return {"position_ids": positions}, 1, columns


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_are_alone(way, use_cache):
    check_packing(convert(model_of("llama"), BLOCK, TOPK), [19, 1, 30], way, use_cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_alone_in_any_family(family):
    check_packing(convert(model_of(family), BLOCK, TOPK), [19, 25], "position_ids", True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # transformers 5.22
@pytest.mark.parametrize("family", HIDING)
def test_packed_documents_are_alone_where_attention_is_not_told_positions(family):
    model = convert(convert(model_of(family), 5, 2), BLOCK, TOPK)
    assert max(len(part._forward_pre_hooks) for part in model.modules()) == 1
    for way, use_cache in [("position_ids", True), ("two rows", False), ("padding", False)]:
        check_packing(model, [19, 25], way, use_cache)


def test_a_loaded_model_whose_attention_is_not_told_positions_raises(tmp_path):
    model, ids = convert(model_of("persimmon"), BLOCK, TOPK), tokens(1, LENGTH)
    positions, _, bounds = packed([20, 25])
    expected = model(ids, position_ids=positions).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="flexmoba"
    )
    with pytest.raises(
        NotImplementedError, match=r"'persimmon' gets no position_ids.*\.attach\(model\)"
    ):
        loaded(ids, position_ids=positions)
    for inputs in ({"cu_seq_lens_q": bounds}, {"use_cache": False}):
        out = loaded(ids, position_ids=positions, **inputs).logits
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attach(loaded)(ids, position_ids=positions).logits, expected)
    place = list(inspect.signature(loaded.forward).parameters).index("position_ids")
    by_place = loaded(ids, *[None] * (place - 1), positions).logits
    torch.testing.assert_close(by_place, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama4_text", "granitemoehybrid"])
def test_positions_that_jump_ahead_are_what_transformers_takes_them_for(family, use_cache):
    """Tests that a jump begins a document only where transformers looks for documents."""
    model, ids = model_of(family), tokens(2, LENGTH)
    model.set_attn_implementation("sdpa")
    positions = torch.arange(LENGTH).expand(2, -1) + (torch.arange(LENGTH) >= 20) * 80
    ways = {"position_ids": positions, "use_cache": use_cache}
    ways = [ways, ways | {"attention_mask": torch.ones_like(positions)}]
    dense = [model(ids, **way).logits for way in ways]
    convert(model, BLOCK, None)
    for way, expected in zip(ways, dense, strict=True):
        torch.testing.assert_close(model(ids, **way).logits, expected)
    apart = (dense[0] - dense[1]).abs().max() > 0.1
    assert apart == (not use_cache and family != "granitemoehybrid")


def check_packing(model, lengths, way, use_cache, *, padding_as_well=True):
    inputs, rows, columns = inputs_of(way, lengths)
    ids = tokens(rows, inputs["position_ids"].shape[1])
    model.train()
    whole = model(ids, use_cache=use_cache, **inputs).logits
    for part in columns.split(lengths):
        positions = inputs["position_ids"][:, part]
        alone = model(ids[:, part], position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(whole[:, part], alone)
        other = ids.clone()
        other[:, part] = VOCABULARY - ids[:, part]
        changed = model(other, use_cache=use_cache, **inputs).logits
        same = torch.full((ids.shape[1],), padding_as_well)
        same[columns] = True
        same[part] = False
        assert_bitwise_equal(changed[:, same], whole[:, same])
        assert (changed[:, part] - whole[:, part]).abs().max() > 0.1


def test_what_positions_said_is_not_remembered_too_long():
    model = convert(model_of("llama"), BLOCK, TOPK)
    ids, positions = tokens(1, 20), torch.arange(20)[None]
    whole = model(ids, position_ids=positions).logits
    positions[0, 10:] -= 10  # in place
    inner = model(ids, position_ids=positions).logits
    torch.testing.assert_close(inner[:, 10:], model(ids[:, 10:]).logits)
    assert (inner - whole)[:, 10:].abs().max() > 0.1
    with torch.inference_mode():
        positions = torch.arange(20)[None]
        assert_bitwise_equal(model(ids, position_ids=positions).logits, whole)
        positions[0, 10:] -= 10
        assert_bitwise_equal(model(ids, position_ids=positions).logits, inner)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiled_without_a_graph_break():
    model, ids = convert(model_of("llama"), BLOCK, TOPK), tokens(1, LENGTH)
    positions, _, bounds = packed([20, 25])
    real = torch.arange(LENGTH)[None] >= 5
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for inputs in (
        {"position_ids": positions, "cu_seq_lens_q": bounds},
        {"attention_mask": real.int()},
        {"attention_mask": (positions != 3).int()},
    ):
        expected = model(ids, use_cache=False, **inputs).logits
        actual = compiled(ids, use_cache=False, **inputs).logits
        shown = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(actual[shown], expected[shown])
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        compiled(ids, position_ids=positions, use_cache=False)


def test_settings_are_saved(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "dense")
    options = {"gate": "group", "gate_block_size": BLOCK // 2, "sink_blocks": 1}
    convert(model, BLOCK, [TOPK, None], eval_topk=2, **options)
    model.save_pretrained(tmp_path / "sparse")
    keys = {}
    for name in ("dense", "sparse"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        keys[name] = loaded.state_dict().keys()
    assert keys["dense"] == keys["sparse"]

    register()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", dtype=torch.float64, attn_implementation="flexmoba"
    )
    assert loaded.config.flexmoba == {
        "block_size": BLOCK, "topk": [TOPK, None], "eval_topk": 2, **options
    }  # fmt: skip
    ids = tokens(2, LENGTH)
    assert not any(isinstance(module, FlexMoba) for module in loaded.modules())
    for train in (True, False):
        expected = model.train(train)(ids).logits
        torch.testing.assert_close(loaded.train(train)(ids).logits, expected)
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    attach(loaded)
    assert [m.topk for m in loaded.modules() if isinstance(m, FlexMoba)] == [TOPK, None]
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_one_sink_block_unless_the_caller_or_the_config_says_otherwise():
    model, ids = model_of("llama"), tokens(1, LENGTH)
    sink = convert(model, BLOCK, TOPK)(ids).logits
    assert model.config.flexmoba["sink_blocks"] == 1
    plain = convert(model, BLOCK, TOPK, sink_blocks=0)(ids).logits
    assert model.config.flexmoba["sink_blocks"] == 0
    assert not torch.allclose(plain, sink)
    # A config that names no sink blocks, as `convert` of 0.1 wrote it, has none.
    del model.config.flexmoba["sink_blocks"]
    for module in model.modules():
        module._modules.pop("flexmoba", None)
    assert_bitwise_equal(model(ids).logits, plain)
    assert_bitwise_equal(attach(model)(ids).logits, plain)


@pytest.mark.parametrize("name", ["topk", "eval_topk"])
def test_one_block_has_no_room_for_the_sink_block(name):
    model = model_of("llama")
    topks = {"topk": TOPK} | {name: [TOPK, 1]}
    with pytest.raises(ValueError, match=f"{name}=1 selects only the own block.* sink_blocks=0$"):
        convert(model, BLOCK, **topks)
    assert not hasattr(model.config, "flexmoba")
    convert(model, BLOCK, **topks, sink_blocks=0)
    assert convert(model, BLOCK, 2)(tokens(1, LENGTH)).logits.isfinite().all()


def test_the_text_model_of_a_larger_one_is_converted():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=VOCABULARY, initializer_range=0.3)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    model = LlavaForConditionalGeneration(config).eval()
    ids = tokens(1, LENGTH).clamp(max=59)
    ids[:, :4] = 60
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    dense = model(ids, pixel_values=pixels).logits
    convert(model, BLOCK, None)
    assert len([m for m in model.modules() if isinstance(m, FlexMoba)]) == 2
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, dense)
    convert(model, BLOCK, TOPK)
    assert (model(ids, pixel_values=pixels).logits - dense).abs().max() > 0.01
    model.set_attn_implementation("flexmoba")  # also in the vision tower
    with pytest.raises(NotImplementedError, match=r"CLIPAttention.*not causal"):
        model(ids, pixel_values=pixels)


@old_name
def test_gradient_checkpointing_changes_nothing():
    model, ids = convert(model_of("llama"), BLOCK, TOPK).train(), tokens(1, LENGTH)
    positions, _, _ = packed([20, 25])
    expected = logits_and_gradients(model, ids, position_ids=positions)
    model.gradient_checkpointing_enable()
    for x, y in zip(
        logits_and_gradients(model, ids, position_ids=positions), expected, strict=True
    ):
        assert_bitwise_equal(x, y)


@old_name
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_step_of_trainer(tmp_path, device):
    model = convert(model_of("llama", dtype=torch.float32), BLOCK, TOPK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, use_cpu=device == "cpu",
        bf16=True, learning_rate=1e-2, report_to=[], save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(2, LENGTH)]
    result = Trainer(model, arguments, train_dataset=data).train()
    assert 0 < result.training_loss < 20
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert (p.cpu() != before[name]).any(), name


def test_a_window_that_no_layer_has_does_not_matter():
    model = model_of("gemma2", sliding_window=19)
    assert convert(model, BLOCK, TOPK)(IDS).logits.isfinite().all()


IDS = tokens(1, 20)
MASK_4D = torch.ones(1, 1, 20, 20).bool().tril()


@pytest.mark.parametrize(
    ("family", "config", "inputs", "error", "text"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, {}, NotImplementedError, "GPT2Attention.*'gpt2'.*dropout"),
        ("llama", {"attention_dropout": 0.1}, {}, NotImplementedError, "attention dropout of 0.1"),
        ("mistral", {"sliding_window": 19}, {}, NotImplementedError, "'mistral'.*of 19 tokens"),
        ("gemma2", {"sliding_window": 19, "layer_types": ["sliding_attention"] * 2}, {},
         NotImplementedError, "'gemma2'.*of 19 tokens.*sliding_window=20 or more"),
        ("llama", {}, {"attention_mask": MASK_4D}, ValueError, r"'llama'.*\(1, 1, 20, 20\)"),
        ("llama", {}, {"is_causal": False}, NotImplementedError, "'llama'.*causal"),
        ("llama", {"is_causal": False}, {}, NotImplementedError, "'llama'.*causal"),
        ("llama", {}, {"sinks": IDS}, NotImplementedError, "LlamaAttention.*sinks"),
        ("llama", {}, {"position_bias": IDS}, NotImplementedError, "position_bias"),
        ("gpt2", {}, {"head_mask": IDS}, NotImplementedError, "GPT2Attention.* passes head_mask"),
        ("llama", {}, {"block_indices": IDS}, NotImplementedError, "block_indices"),
        ("llama", {}, {"output_attentions": True}, NotImplementedError, "attention weights"),
        ("llama", {}, {"attention_mask": torch.ones(1, 19)}, ValueError, "20 in all, got 19"),
        ("llama", {}, {"attention_mask": (torch.arange(20) > 2)[None],
                       "cu_seq_lens_q": torch.tensor([0, 20])}, ValueError, "cu_seq_lens_q"),
        pytest.param(
            "gemma4", {}, {"position_ids": torch.arange(20)[None] % 10, "logits_to_keep": 1},
            NotImplementedError, "'gemma4_text' was given packed documents with 1 queries for 20 k",
            marks=drops_queries),
    ],
)  # fmt: skip
def test_what_is_not_there_raises(family, config, inputs, error, text):
    model = convert(model_of(family, **config), BLOCK, TOPK).train()
    with pytest.raises(error, match=text):
        model(IDS, **inputs)


def test_masks_that_are_not_padding_raise():
    with pytest.raises(NotImplementedError, match="other than causal"):  # bidirectional images
        padding_mask(batch_size=1, q_length=8, kv_length=8, use_vmap=True)
    with pytest.raises(NotImplementedError, match="shorter than the context of 21"):
        # These offsets belong to a cache that keeps one window.
        padding_mask(batch_size=1, q_length=1, kv_length=8, q_offset=20, kv_offset=13)


def test_settings_that_do_not_fit_raise():
    model = model_of("llama")
    register()
    model.set_attn_implementation("flexmoba")
    with pytest.raises(ValueError, match=r"'llama' has no block_size and topk; call .*convert"):
        model(IDS)
    for arguments, error, text in [
        ((0, 3), ValueError, "got 0"),
        ((8, [3]), ValueError, "2 layers, got 1"),
        ((8, [3, 0]), ValueError, "got 0"),
        ((8, "same"), TypeError, "'same'"),
    ]:
        with pytest.raises(error, match=text):
            convert(model, *arguments)
    with pytest.raises(ValueError, match=r"gate_block_size must be one value, .* 2 layers, got 1"):
        convert(model, 8, 3, gate_block_size=(4,))
    with pytest.raises(TypeError, match=r"among gate, .* got score_mod"):
        convert(model, 8, 3, score_mod=max)
    with pytest.raises(TypeError, match="got Linear"):
        convert(torch.nn.Linear(2, 2), 8, 3)
    assert not hasattr(model.config, "flexmoba")


def indexed(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(num_hidden_layers=4))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            lambda: BertModel(BertConfig(**SIZES)),
            {},
            "BertModel dispatches no causal self-attention",
        ),
        (
            lambda: BloomForCausalLM(BloomConfig(n_layer=1)),
            {},
            "Bloom.* dispatches no causal self-attention",
        ),
        (
            lambda: indexed(DeepseekV32Config),
            {},
            "DeepseekV32Attention.* by its own indexer",
        ),
        (lambda: indexed(DeepseekV4Config), {}, "DeepseekV4Attention.* by its own indexer"),
        (lambda: model_of("llama"), {"sink_blocks": TOPK}, "topk=3 is too small for sink_blocks=3"),
    ],
)
def test_a_refused_model_stays_as_it_is(make, options, text):
    model = make()
    before = model.config.to_dict(), model.config._attn_implementation, str(model)
    with pytest.raises(ValueError, match=text):
        convert(model, BLOCK, TOPK, **options)
    assert (model.config.to_dict(), model.config._attn_implementation, str(model)) == before
