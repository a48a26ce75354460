"""Continuous batching of transformers, ``generate_batch``, with pages that hold mean keys.

transformers divides the memory of its cache into blocks, and a block into one page for each layer.
`MobaAllocator` adds the mean keys to each page, so that sharing, forking, eviction and offloading
of blocks include them. `MobaMemoryHandler` computes how many blocks fit in memory.
`MobaBatchingManager` accepts ``attn_implementation="flexmoba"``. All three leave other models
alone. The attention writes the new keys itself and reads the pages in place.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import cache as batching_cache
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from flexmoba.blocks import ceil_div
from flexmoba.integrations.entry import (
    CHILD,
    SERVED,
    check_served,
    mean_keys_by_layer,
    mean_keys_of,
)
from flexmoba.integrations.transformers.settings import (
    NAME,
    local_layers,
    name_of,
    settings_of,
)
from flexmoba.paged import PagedBatch, Pages, append_paged, attend_paged, paged_batch

_FULL = FullAttentionCacheAllocator.layer_type
_Manager = continuous_api.ContinuousBatchingManager
_MemoryHandler = batching_cache.PagedAttentionMemoryHandler

# The allocator of each attention module, as a weak reference, so that a model does not keep the
# memory of a manager that has stopped.
_allocators: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


def register_batching() -> None:
    """Adds the classes of this file to transformers. Repeated calls do no harm."""
    continuous_api.ContinuousBatchingManager = MobaBatchingManager
    batching_cache.PagedAttentionMemoryHandler = MobaMemoryHandler
    batching_cache.ATTN_TYPE_TO_ALLOCATOR[_FULL] = MobaAllocator


class MobaAllocator(FullAttentionCacheAllocator):
    """Allocator whose page has ``page_size`` rows of keys, as many of values, and the mean keys.

    A row is ``(Hkv, D)``. All pages have room for as many mean keys as the layer with the most
    sub-blocks needs. For a model with another attention, the class constructs the allocator of
    transformers.

    Attributes:
        pages: `Pages` of each layer, by its index, with the ids of transformers' blocks.
    """

    def __new__(cls, *, config: Any, **kwargs: Any) -> Any:
        """Returns an allocator for the attention of the config."""
        if config._attn_implementation != NAME:
            return FullAttentionCacheAllocator(config=config, **kwargs)
        return super().__new__(cls)

    def __init__(self, *, config: Any, page_size: int, **kwargs: Any) -> None:
        """Computes the sizes. The cache calls `register_cache_tensor` later."""
        self.mean_keys = _mean_keys(config)
        self.page_rows = 2 * page_size + max(self.mean_keys)
        super().__init__(config=config, page_size=page_size, **kwargs)
        # Rows from block to block. transformers counts its indices in rows of the keys' view.
        self.block_physical_stride = self.page_rows * self.pages_per_block

    def get_bytes_per_page(
        self, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int
    ) -> int:
        """Returns the bytes of a page."""
        return self.page_rows * num_key_value_heads * head_dim * cache_dtype.itemsize

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
    ) -> None:
        """Makes the views of all layers in the memory that the cache has allocated."""
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        blocks = (non_trash_bytes + 2 * bytes_per_sector) // self.bytes_per_block
        heads, dim = self.num_key_value_heads, self.head_dim
        shape = torch.Size((blocks, self.pages_per_block, self.page_rows, heads, dim))
        rows = cache_tensor.view(self.cache_dtype)[: shape.numel()].view(shape)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, rows, pool)
        size = self.tokens_per_page
        self.pages = {}
        for i, layer in enumerate(self.layer_indices):
            means = rows[:, i, 2 * size :][:, : self.mean_keys[layer]]
            keys, values = rows[:, i, :size], rows[:, i, size : 2 * size]
            self.pages[layer] = Pages(*(x.transpose(1, 2) for x in (keys, values, means)))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values, which the attention writes."""
        return key_states, value_states

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Returns the first row of each block of a request, in place of a row for each token."""
        blocks = ceil_div(past_length + query_length, self.tokens_per_page)
        return [x * self.block_physical_stride for x in self.block_table[request_id][:blocks]]

    def get_cache_for_block_table(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, by block. The attention does not use the result."""
        return self.pages[layer_idx].k, self.pages[layer_idx].v

    def fill_block_table(
        self, request_id: str, past_length: int, query_length: int, block_table: Tensor
    ) -> None:
        """Fills the row of a request with the ids of its blocks."""
        blocks = torch.tensor(self.block_table[request_id], dtype=block_table.dtype)
        block_table[: len(blocks)].copy_(blocks, non_blocking=True)


class MobaMemoryHandler(_MemoryHandler):  # type: ignore[misc, valid-type]
    """Computes how many blocks fit in memory.

    For attentions other than FlashAttention, transformers reserves a mask of all tokens of a batch
    by all tokens of the cache, and keys and values that are repeated for all query heads. MoBA has
    neither. Its blocks are larger than those of transformers by the mean keys.
    """

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        """Reserves memory as for FlashAttention if the attention of the config is MoBA."""
        super().__init__(config=config, **kwargs)
        if config._attn_implementation == NAME:
            self.num_attention_masks = 0
            self.kv_heads_at_peak = 2 * batching_cache.find_num_key_value_heads(config)
            rows = 2 * kwargs["cb_config"].page_size
            page_rows = rows + max(_mean_keys(config))
            self.bytes_per_block = kwargs["bytes_per_block"] // rows * page_rows


class MobaBatchingManager(_Manager):  # type: ignore[misc, valid-type]
    """Manager of transformers that also accepts ``attn_implementation="flexmoba"``."""

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any = None,
    ) -> None:
        """Resolves the config for the attention of the model."""
        asked = continuous_batching_config
        if _is_moba(model):
            check_batching(model, asked.page_size)
        super().__init__(model, generation_config, asked, workload_hints)
        if not _is_moba(model):
            return
        # transformers uses block tables and CUDA graphs by default with FlashAttention alone. Here,
        # a batch of decoding steps has them, and a batch with a prefill chunk, which reads lengths
        # back to the host, has no graph.
        config = self.continuous_batching_config
        text = model.config.get_text_config()
        longest = ceil_div(text.max_position_embeddings, asked.page_size) + 1
        given = asked.max_blocks_per_request
        config.max_blocks_per_request = longest if given is None else given
        graphs = asked.use_cuda_graph
        if graphs is None or isinstance(graphs, bool):
            graphs = (False, graphs is not False)
        is_cuda = model.device.type == "cuda"
        config.use_cuda_graph = (False, graphs[1] and is_cuda and config.max_blocks_per_request > 0)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Keeps ``"flexmoba"``, and switches other attentions as transformers does."""
        if not _is_moba(model):
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stops the manager. Unless it is kept, the model may have another one."""
        super().stop(*args, **kwargs)
        if self.batch_processor is None and _is_moba(self.model):
            for module in _modules(self.model):
                _allocators.pop(module, None)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if _is_moba(self.model):
            _admit_after_cancellations(processor.scheduler)
            # transformers has computed the number for blocks without mean keys.
            n_blocks = processor.cache.cache_allocators[_FULL].num_blocks
            processor.cache.num_blocks = self.continuous_batching_config.num_blocks = n_blocks
            for module in _modules(self.model):
                allocator = processor.cache.layer_to_allocator[module.layer_idx]
                other = _allocators.get(module, lambda: None)()
                if other is not None and other is not allocator:
                    raise RuntimeError(
                        f"{name_of(module)} already has pages of another manager of continuous "
                        "batching; stop that manager first"
                    )
                _allocators[module] = weakref.ref(allocator)
        return processor


def _admit_after_cancellations(scheduler: Any) -> None:
    """Makes a scheduler admit waiting requests if cancellations leave no active one.

    After an eviction, transformers admits no request until an active one finishes. If all active
    ones are cancelled instead, the engine would wait forever.
    """
    clear = scheduler.clear_cancelled_requests

    def clear_cancelled_requests() -> Any:
        cancelled = clear()
        if not scheduler.active_requests:
            scheduler.block_new_requests = False
        return cancelled

    scheduler.clear_cancelled_requests = clear_cancelled_requests


def check_batching(model: Any, page_size: int) -> None:
    """Raises unless continuous batching supports the settings of a model.

    Args:
        model: A transformers model with ``attn_implementation="flexmoba"``.
        page_size: Tokens in a page.

    Raises:
        ValueError: The page is not a block, or the sub-blocks of a layer are not those of the
            config.
        NotImplementedError: The model has local layers, or an option that pages do not support.
    """
    config = model.config.get_text_config(decoder=True)
    groups = batching_cache.group_layers_by_attn_type(config)
    if set(groups) != {_FULL} or local_layers(config):
        raise NotImplementedError(
            f"continuous batching with flexmoba needs full attention or MoBA in all layers, but "
            f"model type {config.model_type!r} has {', '.join(groups)}; use generate, or another "
            "attn_implementation"
        )
    sizes: list[int] = []  # of sub-blocks
    for module in _modules(model):
        block_size, _, options = settings_of(module)
        check_served(options)
        if block_size != page_size:
            raise ValueError(
                f"a page must hold one block of {block_size} tokens, got page_size={page_size}; "
                f"pass ContinuousBatchingConfig(page_size={block_size})"
            )
        sizes.append(block_size // mean_keys_of(options, block_size))
    converted = [page_size // n for n in _mean_keys(config)]
    if sizes != converted:
        of_all = sizes[0] if len(set(sizes)) == 1 else sizes
        raise ValueError(
            f"the sub-blocks of the layers have {sizes} keys now, but those of config.flexmoba, "
            f"for which pages are made, have {converted}; call convert with gate_block_size="
            f"{of_all}"
        )


def _mean_keys(config: Any) -> list[int]:
    """Returns the mean keys in a page of each layer."""
    return mean_keys_by_layer(getattr(config, CHILD), config.num_hidden_layers)


def is_paged(kwargs: Mapping[str, Any]) -> bool:
    """Returns whether the arguments of an attention come from continuous batching."""
    return kwargs.get("write_index") is not None


# Not compiled, because it reads lengths back to the host. CUDA graphs capture it as it is.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Writes new tokens into the pages of a layer, and attends to the pages.

    Args:
        module: The attention module.
        query: Queries of a ragged batch, ``(1, Hq, T, D)``.
        key: New keys, ``(1, Hkv, T, D)``.
        value: New values, ``(1, Hkv, T, D)``.
        scaling: Factor on the attention scores; ``1 / sqrt(D)`` by default.
        kwargs: Arguments of the batch. transformers 5.23 passes its cache, and the attention calls
            ``cache.update``; from 5.24 on, the model has called it. The call selects the arguments
            of the layer's type.

    Returns:
        The output, ``(1, Hq, T, D)``, and the log-sum-exp, ``(1, Hq, T)``.

    Raises:
        RuntimeError: No manager has made pages for the layer.
    """
    if kwargs.get("cache") is not None:
        key, value = kwargs["cache"].update(key, value, module.layer_idx, kwargs=kwargs)
    allocator = _allocators.get(module, lambda: None)()
    if allocator is None:
        raise RuntimeError(
            f"{name_of(module)} has no pages of continuous batching; call flexmoba.integrations."
            "transformers.register() before init_continuous_batching"
        )
    _, topk, options = settings_of(module)
    pages = allocator.pages[module.layer_idx]
    query, key, value = (x[0].transpose(0, 1).to(pages.k.dtype) for x in (query, key, value))
    batch, slots = _batch_of(query.shape[0], allocator, kwargs)
    append_paged(key, value, pages, slots)
    options = {name: options[name] for name in SERVED if name in options}
    out, lse = attend_paged(query, pages, batch, topk, scale=scaling, **options)
    return out.transpose(0, 1)[None], lse.T[None]


def _batch_of(tokens: int, allocator: Any, kwargs: dict[str, Any]) -> tuple[PagedBatch, Tensor]:
    """Returns the batch and the slots of its tokens, which the first layer computes for all."""
    bounds: Any = kwargs["cu_seq_lens_q"]
    # A capture must contain its own computation, and transformers runs each batch once before it.
    key = bounds.is_cuda and torch.cuda.is_current_stream_capturing()
    known: dict[bool, tuple[PagedBatch, Tensor]] | None = getattr(bounds, "flexmoba_batch", None)
    if known is not None and key in known:
        return known[key]
    size, ends = allocator.tokens_per_page, kwargs["cu_seq_lens_k"]
    table = kwargs.get("block_table")
    if table is None:
        table = _table_of(ends, allocator, kwargs)
    table = table.clamp(min=0)  # unused entries are -1
    batch = paged_batch(
        bounds, ends.diff(), table, tokens=tokens, max_query_len=kwargs["max_length_q"]
    )
    position = batch.positions.clamp(min=0)
    slots = batch.block_table[batch.rows, position // size].long() * size + position % size
    slots = slots.masked_fill(batch.positions < 0, -1)
    bounds.flexmoba_batch = {key: (batch, slots)}
    return batch, slots


def _table_of(ends: Tensor, allocator: Any, kwargs: dict[str, Any]) -> Tensor:
    """Returns the block table of a batch, ``(B, N)`` int32, from the rows that transformers lists.

    These are the first rows of all blocks or, in a batch without cached tokens, the rows of all new
    tokens.
    """
    size = allocator.tokens_per_page
    read, write = (kwargs[x][allocator.index] for x in ("read_index", "write_index"))
    width = max(1, ceil_div(int(kwargs["max_length_k"]), size))
    block = torch.arange(width, device=ends.device)
    lengths = ends.diff()[:, None]
    if read.numel():
        blocks = ceil_div(lengths, size)
        rows, index = read, blocks.cumsum(0) - blocks + block
    else:
        rows, index = write, ends[:-1, None] + block * size
    table: Tensor = rows[index.clamp(max=rows.shape[0] - 1)] // allocator.block_physical_stride
    return table.masked_fill(block * size >= lengths, 0).int()


def _is_moba(model: Any) -> bool:
    is_moba: bool = model.config.get_text_config(decoder=True)._attn_implementation == NAME
    return is_moba


def _modules(model: nn.Module) -> list[Any]:
    """Returns the attention modules of the (text) decoder."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    return [
        module
        for module in model.modules()
        if getattr(module, "config", None) is config
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
    ]
