"""The attention backend of vLLM. A page of a KV head holds keys, values, and mean keys.

A page of vLLM has the logical shape ``(Hkv, N, C)`` for N tokens with C features. The backend asks
for room for S mean keys, ``C = D + Dv + ceil(S * D / N)``, so that vLLM counts, shares and moves
them with the page. S is 1, or the number of sub-blocks of a block. Within the contiguous run of a
head come the keys ``(N, D)``, the values ``(N, Dv)``, and the mean keys ``(S, D)``.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from flexmoba.blocks import ceil_div
from flexmoba.cache import MAX_STEP_QUERIES
from flexmoba.integrations.vllm.settings import (
    LayerSettings,
    check_features,
    check_page_size,
    entry_of,
    most_mean_keys,
    settings_of,
)
from flexmoba.paged import PagedBatch, Pages, append_paged, attend_paged, paged_batch


class MobaBackend(AttentionBackend):
    """Mixture of Block Attention over pages (arXiv 2502.13189)."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto"]
    # Mean keys for which all pages have room. `MobaImpl` sets it, since vLLM asks for the spec
    # of a layer right after it has constructed the layers, but without its config.
    page_mean_keys: ClassVar[int] = 1

    @staticmethod
    def get_name() -> str:
        """Returns the name by which vLLM finds the backend."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Returns the supported page sizes."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Returns the block size of the model, where a platform asks for it."""
        entry = entry_of(get_current_vllm_config())
        return default_block_size if entry is None else int(entry["block_size"])

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Returns the layout in which the features of a head and page are adjacent."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Adds room for the mean keys to each page."""
        if spec.state_content_bytes is not None:
            return spec
        means = ceil_div(cls.page_mean_keys * spec.head_size, spec.block_size)
        features = spec.head_size + spec.head_size_v + means
        return replace(spec, state_content_bytes=features * spec.dtype.itemsize)

    @staticmethod
    def get_impl_cls() -> type["MobaImpl"]:
        """Returns the class of a layer's attention."""
        return MobaImpl

    @staticmethod
    def get_builder_cls() -> type["MobaBuilder"]:
        """Returns the class that describes batches."""
        return MobaBuilder


@dataclass
class MobaMetadata(AttentionMetadata):
    """One batch, for all layers.

    Attributes:
        tokens: Tokens of the batch.
        batch: The sequences of the batch.
    """

    tokens: int
    batch: PagedBatch


class MobaBuilder(AttentionMetadataBuilder[MobaMetadata]):
    """Describes batches. Tensors that kernels read stay in place, as CUDA graphs need."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        """Checks the page size of the layers."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        entry = entry_of(vllm_config)
        assert entry is not None
        check_page_size(entry, kv_cache_spec.block_size)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tokens = max(tokens, vllm_config.scheduler_config.max_num_seqs)
        self.rows, self.positions = torch.zeros(2, tokens, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> MobaMetadata:
        """Returns the description of a batch."""
        given = common_attn_metadata
        tokens = given.num_actual_tokens
        batch = paged_batch(
            given.query_start_loc,
            given.seq_lens,
            given.block_table_tensor,
            tokens=tokens,
            max_query_len=given.max_query_len,
        )
        if given.max_query_len <= MAX_STEP_QUERIES:
            rows, positions = self.rows[:tokens], self.positions[:tokens]
            rows.copy_(batch.rows)
            positions.copy_(batch.positions)
            batch = batch._replace(rows=rows, positions=positions)
        return MobaMetadata(tokens, batch)


class MobaImpl(AttentionImpl[MobaMetadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **other: Any,
    ) -> None:
        """Checks that flexmoba supports the layer."""
        entry = entry_of(get_current_vllm_config())
        assert entry is not None  # `check_selected` has raised otherwise
        self.entry = entry
        MobaBackend.page_mean_keys = most_mean_keys()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.value_size: int = other.pop("head_size_v", None) or head_size
        self.settings: LayerSettings | None = None
        check_features(
            {
                "ALiBi": alibi_slopes is not None,
                "a sliding window": sliding_window is not None,
                "a bound of the scores (soft cap)": bool(logits_soft_cap),
                f"{attn_type} attention": attn_type != AttentionType.DECODER,
                "layers that share keys": kv_sharing_target_layer_name is not None,
            }
            | {f"{name}={value!r}": value is not None for name, value in other.items()}
        )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes new keys ``(T, Hkv, D)`` and values ``(T, Hkv, Dv)`` into their slots."""
        n = min(key.shape[0], slot_mapping.shape[0])  # either may be padded
        append_paged(key[:n], value[:n], self.pages_of(layer, kv_cache), slot_mapping[:n])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MobaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attends from ``query (T, Hq, D)`` to the pages, and writes ``output (T, Hq, Dv)``."""
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        n, settings = attn_metadata.tokens, self.settings_of(layer)
        out, _ = attend_paged(
            query[:n],
            self.pages_of(layer, kv_cache),
            attn_metadata.batch,
            settings.topk,
            scale=self.scale,
            **settings.options,
        )
        output[:n] = out
        return output

    def settings_of(self, layer: Any) -> LayerSettings:
        """Returns the settings of the layer."""
        if self.settings is None:
            self.settings = settings_of(self.entry, extract_layer_index(layer.layer_name))
        return self.settings

    def pages_of(self, layer: Any, kv_cache: Tensor) -> Pages:
        """Returns the pages of the layer, as views of ``kv_cache (B, Hkv, N, C)``."""
        pages, heads, n, features = kv_cache.shape
        dim, value_dim = self.head_size, self.value_size
        run = kv_cache.view(pages, heads, n * features)  # not a copy, which `flatten` could be
        keys, values, means = run.tensor_split((n * dim, n * (dim + value_dim)), dim=2)
        mean_keys = self.settings_of(layer).mean_keys
        return Pages(
            keys.unflatten(2, (n, dim)),
            values.unflatten(2, (n, value_dim)),
            means[..., : mean_keys * dim].unflatten(2, (mean_keys, dim)),
        )
