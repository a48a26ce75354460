"""Two-layer transformers models with random weights, and the oracle as an attention function."""

from functools import cache

import torch
from torch import Tensor
from transformers import (
    AfmoeConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cohere2Config,
    CTRLConfig,
    DiffLlamaConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MoshiConfig,
    Olmo3Config,
    PersimmonConfig,
    PhiConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from flexmoba import moba_reference

VOCABULARY = 61
# Large weights, so that attention is far from uniform.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": 0}
COMMON |= {"bos_token_id": None, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = 8
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, **GROUPED),
    "qwen2": lambda: Qwen2Config(**COMMON, **GROUPED),
    "qwen3": lambda: Qwen3Config(**COMMON, **GROUPED, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, **GROUPED, sliding_window=None),
    "phi": lambda: PhiConfig(**COMMON, **GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SIZES),
    "gpt2": lambda: GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=256,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, scale_attn_by_inverse_layer_idx=True,
    ),
    # A cap and a scale that change the output clearly.
    "gemma2": lambda: Gemma2Config(
        **COMMON, **GROUPED, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=3,
        layer_types=["full_attention"] * 2,
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)
SHARING = GROUPED | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8,
    "layer_types": ["full_attention"] * 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
# Models that do not pass position_ids to their attention. The last one does not use them for its
# mask either.
HIDING = {
    "llama4_text": lambda: Llama4TextConfig(
        **COMMON, **GROUPED, head_dim=8, intermediate_size_mlp=48, moe_layers=[],
    ),
    "gpt_bigcode": lambda: GPTBigCodeConfig(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=256,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "persimmon": lambda: PersimmonConfig(
        **COMMON, **SIZES, hidden_dropout=0.0, attention_dropout=0.0,
    ),
    "ctrl": lambda: CTRLConfig(
        **COMMON, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0,
    ),
    "moshi": lambda: MoshiConfig(**COMMON, **GROUPED, head_dim=8, ffn_dim=48),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **COMMON, **GROUPED, layer_types=["attention"] * 2, num_local_experts=0,
        shared_intermediate_size=48, position_embedding_type="rope", mamba_n_heads=4,
    ),
}  # fmt: skip
LOCAL = GROUPED | {
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
SHARING_LOCAL = SHARING | {"sliding_window": WINDOW, "layer_types": LOCAL["layer_types"] * 2}
# Models with one local and one global layer.
WINDOWED = {
    "local gemma2": lambda: Gemma2Config(
        **COMMON, **LOCAL, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=3,
    ),
    "local gemma3": lambda: Gemma3TextConfig(**COMMON, **LOCAL, head_dim=8),
    "local olmo3": lambda: Olmo3Config(**COMMON, **LOCAL),
    "local qwen3": lambda: Qwen3Config(**COMMON, **LOCAL, head_dim=8, use_sliding_window=True),
    "local ministral": lambda: MinistralConfig(**COMMON, **LOCAL, head_dim=8),
    "local cohere2": lambda: Cohere2Config(**COMMON, **LOCAL, logit_scale=1.0),
    "local exaone4": lambda: Exaone4Config(**COMMON, **LOCAL),
    "local afmoe": lambda: AfmoeConfig(
        **COMMON, **LOCAL, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, num_dense_layers=2,
    ),
    "local llama4": lambda: Llama4TextConfig(
        **COMMON, **GROUPED, head_dim=8, intermediate_size_mlp=48, moe_layers=[],
        attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "local gpt_oss": lambda: GptOssConfig(
        **COMMON, **LOCAL, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip
# Models for only one or two tests.
CONFIGS |= HIDING | WINDOWED | {
    "diffllama": lambda: DiffLlamaConfig(**COMMON, **GROUPED),
    "lfm2": lambda: Lfm2Config(**COMMON, **GROUPED, layer_types=["conv", "full_attention"]),
    "phimoe": lambda: PhimoeConfig(**COMMON, **GROUPED, num_local_experts=2),
    # The last two layers of these models attend to keys of earlier layers.
    "gemma3n": lambda: Gemma3nTextConfig(
        **COMMON, **SHARING, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": lambda: Gemma4TextConfig(**COMMON, **SHARING, global_head_dim=8),
    "local gemma3n": lambda: Gemma3nTextConfig(
        **COMMON, **SHARING_LOCAL, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "local gemma4": lambda: Gemma4TextConfig(**COMMON, **SHARING_LOCAL, global_head_dim=8),
}  # fmt: skip


def model_of(family: str, *, dtype: torch.dtype = torch.float64, **config) -> PreTrainedModel:
    """Returns a new model in evaluation mode, with the same weights for every call."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = CONFIGS[family]()
    made.update(config)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="eager")
    torch.random.set_rng_state(generator)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Returns random token ids, ``(batch, length)`` int64, without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@cache
def register_oracle() -> None:
    """Registers ``attn_implementation="oracle"``: `moba_reference`, with the arguments of tests."""
    AttentionInterface.register("oracle", _oracle)
    AttentionMaskInterface.register("oracle", lambda attention_mask=None, **_: attention_mask)


def _oracle(
    module, query, key, value, attention_mask, scaling, softcap=None, document_ids=None,
    block_size=None, topk=None, sink_blocks=0, **_,
):  # fmt: skip
    def capped(score, b, h, q_idx, kv_idx):
        return softcap * torch.tanh(score / softcap)

    out = moba_reference(
        *(query, key, value, block_size, topk),
        scale=scaling,
        sink_blocks=sink_blocks,
        score_mod=None if softcap is None else capped,
        document_ids=document_ids,
        key_padding_mask=attention_mask,
    )
    return out.transpose(1, 2), None
