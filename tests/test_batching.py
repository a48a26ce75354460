"""Tests of continuous batching by transformers: tokens equal those of `generate`."""

import gc

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AttentionInterface,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
)
from transformers.generation.continuous_batching import cache as batching_cache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from flexmoba.integrations.entry import check_served
from flexmoba.integrations.transformers import convert
from tests.tiny_models import VOCABULARY, model_of

BLOCK, STEPS = 8, 6
GREEDY = GenerationConfig(
    max_new_tokens=STEPS, do_sample=False, eos_token_id=VOCABULARY, pad_token_id=0
)


def prompts(*lengths: int, shared: int = 43) -> list[list[int]]:
    """Draws prompts of these lengths, and two that share their first tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    prefix = draw(shared)
    return [draw(n) for n in lengths] + [prefix + draw(3), prefix + draw(9)]


def assert_greedy(model, inputs: list[list[int]], new: list[list[int]]) -> None:
    """Asserts that passes over all tokens select the same new tokens, as in `generate`."""
    for prompt, tokens in zip(inputs, new, strict=True):
        assert len(tokens) == STEPS
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens


def batched(model, inputs: list[list[int]], **options) -> list[list[int]]:
    config = {"page_size": BLOCK, "num_blocks": 80, "max_batch_tokens": 40}
    config = ContinuousBatchingConfig(**config | options)
    outputs = model.generate_batch(
        inputs, generation_config=GREEDY, continuous_batching_config=config
    )
    assert not [x.error for x in outputs.values() if x.error]
    return [x.generated_tokens for x in outputs.values()]


def moba_model(family: str = "llama", topk=(3, None), **options):
    return convert(model_of(family), BLOCK, list(topk), **{"sink_blocks": 0} | options)


@pytest.mark.parametrize(
    ("family", "topk", "options"),
    [
        ("llama", (3, None), {"sink_blocks": 0}),
        ("qwen3", (2, 3), {"gate": "group", "sink_blocks": 1}),
        ("llama", (3, 4), {"gate_block_size": 2, "sink_blocks": 1}),
        ("qwen3", (3, 3), {"gate_block_size": [None, 4], "gate": "group", "sink_blocks": 0}),
    ],
)
def test_tokens_equal_those_of_generate(family, topk, options):
    model, inputs = moba_model(family, topk, **options), prompts(2, 8, 90, 45)
    new = batched(model, inputs)
    assert_greedy(model, inputs, new)
    (expected,) = model.generate(torch.tensor(inputs[2:3]), generation_config=GREEDY)
    assert inputs[2] + new[2] == expected.tolist()
    with pytest.raises(AssertionError):  # so that the comparison can fail
        assert_greedy(convert(model, BLOCK, None), inputs, new)


@pytest.mark.parametrize(
    "options",
    [
        {"max_blocks_per_request": 0},  # all batches by indices
        {"max_blocks_per_request": 6},  # long requests by indices, short ones by block tables
        {"allow_block_sharing": False},
        pytest.param(  # with padding
            {"varlen_compile_config": CompileConfig(backend="eager", fullgraph=False)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tokens_do_not_depend_on_the_options_of_the_batches(options):
    model, inputs = moba_model(), prompts(2, 90)
    assert_greedy(model, inputs, batched(model, inputs, **options))


@pytest.mark.parametrize("options", [{}, {"gate_block_size": 2}])
def test_evicted_requests_return_with_the_same_tokens(monkeypatch, options):
    offload, evictions = OffloadingManager.offload_requests, []

    def counted(manager):
        evictions.append(offload(manager))
        return evictions[-1]

    monkeypatch.setattr(OffloadingManager, "offload_requests", counted)
    model, inputs = moba_model(**options), prompts(60, 40, 50, 21)
    assert_greedy(model, inputs, batched(model, inputs, num_blocks=16))
    assert any(evictions)


@pytest.mark.parametrize("gate_block_size", [None, 2])
def test_forked_requests_continue_with_copies_of_their_last_page(gate_block_size):
    # The page of tokens 40 to 44 is copied, and is a past block from token 48 on.
    model, inputs = moba_model(topk=(3, 3), gate_block_size=gate_block_size), prompts(45, 5)
    config = {"page_size": BLOCK, "num_blocks": 80, "max_batch_tokens": 64, "return_logprobs": True}
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 14}
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(**sampling, eos_token_id=VOCABULARY, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**config),
    )
    requests = [(list(x.prompt_ids), x.generated_tokens, x.logprobs) for x in outputs.values()]
    assert len({tuple(new) for _, new, _ in requests}) == 3 * len(inputs)
    for prompt, new, found in requests:
        ids = torch.tensor([prompt + new])
        logprobs = model(ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_requests_wait_no_longer_if_all_active_ones_are_cancelled():
    model, (first, second, *_) = moba_model(), prompts(60, 40)
    config = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=40, max_batch_tokens=64)
    manager = model.init_continuous_batching(
        generation_config=GREEDY, continuous_batching_config=config
    )
    manager.batch_processor = engine = manager._create_batch_processor()

    def step() -> None:
        assert engine.prepare_next_batch()
        manager._generation_step()
        engine.update_batch()

    manager.add_request(first, request_id="first")
    step()
    engine.scheduler.block_new_requests = True  # as after an eviction
    manager.add_request(second, request_id="second")
    step()
    assert list(engine.scheduler.active_requests) == ["first"]
    manager.cancel_request("first")
    for _ in range(STEPS):
        step()
    output = manager.get_result(timeout=1)
    assert output.request_id == "second"
    assert_greedy(model, [second], [output.generated_tokens])


@pytest.mark.parametrize(("n_blocks", "gate_block_size"), [(17, None), (300, None), (300, 2)])
def test_the_cache_has_as_many_blocks_as_the_config_names(n_blocks, gate_block_size):
    config = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=n_blocks, max_batch_tokens=40)
    model = moba_model(gate_block_size=gate_block_size)
    manager = model.init_continuous_batching(
        generation_config=GREEDY, continuous_batching_config=config
    )
    cache = manager._create_batch_processor().cache
    (allocator,) = cache.cache_allocators.values()
    assert allocator.num_blocks == cache.num_blocks == n_blocks
    assert manager.continuous_batching_config.num_blocks == n_blocks
    prompt = [1] * (n_blocks * BLOCK)
    assert cache.can_store_request_tokens(RequestState("0", prompt), len(prompt))
    assert cache.compute_free_capacity() == 0


def test_samples_of_one_prompt_share_its_pages():
    model = moba_model()
    sampled = GenerationConfig(
        **GREEDY.to_diff_dict() | {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    )
    config = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=80, max_batch_tokens=40)
    (prompt, *_) = prompts(45)
    outputs = model.generate_batch(
        [prompt], generation_config=sampled, continuous_batching_config=config
    )
    assert_greedy(model, [prompt] * 3, [x.generated_tokens for x in outputs.values()])


def test_sinks_of_a_model_weigh_on_the_output():
    layers = model_of("local gpt_oss").config.num_hidden_layers
    options = {"layer_types": ["full_attention"] * layers, "dtype": torch.float32}
    model = convert(model_of("local gpt_oss", **options), BLOCK, 3)
    inputs = prompts(70)
    assert_greedy(model, inputs, batched(model, inputs))


def test_other_models_keep_the_cache_of_transformers(monkeypatch):
    moba_model()
    made = []
    register = FullAttentionCacheAllocator.register_cache_tensor
    monkeypatch.setattr(
        FullAttentionCacheAllocator,
        "register_cache_tensor",
        lambda self, *args: (made.append(type(self)), register(self, *args))[1],
    )
    dense, inputs = model_of("llama"), prompts(2, 60)
    assert_greedy(dense, inputs, batched(dense, inputs))
    assert made == [FullAttentionCacheAllocator]


def test_nearly_all_free_memory_becomes_pages(monkeypatch):
    free = 2**36
    monkeypatch.setattr(
        batching_cache, "get_device_and_memory_breakdown", lambda: ("cuda", free, 0, 0)
    )
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    page, block = 128, 16 * (2 * 128 + 1) * 8 * 64 * 2
    config.flexmoba = {"block_size": page, "topk": 8}

    def share(attention: str) -> float:
        """Returns the share of the free memory that transformers gives to the pages."""
        config._attn_implementation = attention
        settings = ContinuousBatchingConfig(page_size=page, max_memory_percent=1.0)
        settings.max_requests_per_batch, settings.max_blocks_per_request = 64, 0
        handler = batching_cache.PagedAttentionMemoryHandler(
            config=config, cb_config=settings, dtype=torch.bfloat16, bytes_per_sector=block,
            tokens_per_sector=page, bytes_per_block=block, attn_types=["full_attention"],
            model_supports_logits_to_keep=True,
        )  # fmt: skip
        return handler.infer_max_batch_tokens_and_num_sectors()[1] * block / free

    moba_model()  # registers the attention
    assert share("flexmoba") > 0.9
    assert share("sdpa") < 0.6  # with the mask and the repeated keys of transformers


def with_other_gate(model):
    """Changes the sub-blocks of the last layer, after `convert` has written the config."""
    model.model.layers[-1].self_attn.flexmoba.options["gate_block_size"] = 2
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (moba_model, {"page_size": 16}, ValueError, "block of 8 tokens, got page_size=16; pass"),
        (lambda: moba_model(impl="portable"), {}, NotImplementedError, "impl='portable'; convert"),
        (lambda: with_other_gate(moba_model(gate_block_size=4)), {}, ValueError,
         r"have \[4, 2\] keys now, .* have \[4, 4\]; call convert with gate_block_size=\[4, 2\]$"),
        (lambda: convert(model_of("llama"), 128, 3, gate="tile"), {"page_size": 128},
         NotImplementedError, "gate='tile'; convert the model with gate='token' or 'group'"),
        (lambda: convert(model_of("local gemma3"), BLOCK, 3), {}, NotImplementedError,
         "has sliding_attention, full_attention"),
    ],
)  # fmt: skip
def test_models_that_pages_do_not_support(make, options, error, text):
    with pytest.raises(error, match=text):
        batched(make(), prompts(4), **options)


def test_options_that_pages_do_not_know():
    check_served({"block_size": 8, "topk": None, "gate": "group", "sink_blocks": 2, "other": None})
    with pytest.raises(NotImplementedError, match=r"support other=3; convert .* with other=None"):
        check_served({"gate": "token", "other": 3})


def test_errors_of_the_attention():
    model = moba_model()
    module, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8)
    call = model.config._attn_implementation, {"write_index": [torch.zeros(3)]}
    attend = batching_attention(call[0])
    with pytest.raises(RuntimeError, match="no pages of continuous batching; call"):
        attend(module, x, x, x, None, **call[1])
    for option in ({"softcap": 3.0}, {"sliding_window": 4}):
        with pytest.raises(NotImplementedError, match=f"has {next(iter(option))}="):
            attend(module, x, x, x, None, **option, **call[1])


def batching_attention(name: str):
    return AttentionInterface()[name]


def test_a_second_manager_of_a_model_raises():
    model = moba_model()
    config = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=20, max_batch_tokens=40)
    options = {"generation_config": GREEDY, "continuous_batching_config": config}
    manager = model.init_continuous_batching(**options)
    manager.warmup()
    with pytest.raises(RuntimeError, match="pages of another manager"):
        model.init_continuous_batching(**options).warmup()
    processor = manager.batch_processor
    manager.start()
    manager.stop()
    second = model.init_continuous_batching(**options)
    second.warmup()
    assert second.batch_processor is not processor
    del second
    gc.collect()
    model.init_continuous_batching(**options).warmup()
