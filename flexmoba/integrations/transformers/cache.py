"""A transformers cache whose layers keep mean keys, for sparse decoding by ``generate``."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from flexmoba.cache import MobaCache, storage
from flexmoba.integrations.transformers.settings import local_layers
from flexmoba.runtime import autocast_dtype


class FlexMobaCache(Cache):
    """Cache with a `MobaCache` for every layer of a model with ``attn_implementation="flexmoba"``.

    Pass a new cache to ``generate`` or to the model as ``past_key_values``. A decoding step then
    reads only mean keys and selected blocks (arXiv 2502.13189, Sec. 2.2). The cache supports greedy
    decoding, sampling, beam search, assisted decoding, prefill in chunks, and batches with padding.
    It is for inference only.

    Args:
        max_cache_len: Capacity of each row in tokens, including the prompt. The storage then never
            moves, which ``torch.compile`` and CUDA graphs need, and ``generate`` compiles its steps
            on a GPU. None for storage that grows.
        config: Config of the model. Required only for models whose local layers keep a sliding
            window or chunks: these layers get a cache of transformers, which holds one window.

    Raises:
        ValueError: ``max_cache_len`` is less than 1.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flexmoba.integrations.transformers import FlexMobaCache, convert
        >>> config = LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=32,
        ...     intermediate_size=64,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> model = convert(LlamaForCausalLM(config).eval(), block_size=8, topk=3)
        >>> prompt = torch.randint(1, 99, (1, 50))  # 0 is padding
        >>> cache = FlexMobaCache()
        >>> tokens = model.generate(
        ...     prompt, past_key_values=cache, max_new_tokens=5, eos_token_id=None, pad_token_id=0
        ... )
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 55]), 54)
    """

    def __init__(self, max_cache_len: int | None = None, *, config: Any = None) -> None:
        """Makes an empty cache."""
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(
                f"max_cache_len must be at least 1 or None, got {max_cache_len}; pass the number "
                "of tokens of prompt and output"
            )
        self.max_cache_len = max_cache_len
        super().__init__(layer_class_to_replicate=partial(MobaLayer, max_cache_len))
        local = () if config is None else local_layers(config.get_text_config(decoder=True))
        if local:  # all layers now, since the masks depend on the first layer of each type
            default = (
                DynamicCache(config=config)
                if max_cache_len is None
                else StaticCache(config, max_cache_len)
            )
            self.layers = [
                layer if index in local else MobaLayer(max_cache_len)
                for index, layer in enumerate(default.layers)
            ]

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile steps: only if the storage does not grow."""
        return self.max_cache_len is not None

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns the capacity in tokens, or -1 if the storage grows."""
        return self.max_cache_len or -1

    def _no_states(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "a FlexMobaCache holds keys and values, not the states of recurrent layers or "
            "convolutions; use a cache of transformers for this model"
        )

    get_conv_state = update_conv_state = _no_states
    get_recurrent_state = update_recurrent_state = _no_states


class MobaLayer(CacheLayerMixin):
    """Cache of one layer.

    A model calls `update` with new keys and values, and then its attention. Only the attention
    knows padding, so `update` returns the new keys and values with a reference to this layer. The
    attention finds the layer by `layer_of`, and calls `attend`, which appends them.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None) -> None:
        """Makes an empty layer."""
        super().__init__()
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        # The number of columns so far. transformers counts padding as columns. In a static cache it
        # is a tensor, because compiled code would recompile for each value of an int.
        self.columns: int | Tensor = 0
        # How many of the first columns may contain padding; in a static cache, 1 if any may.
        self._padded_columns = 0
        self._is_unattended = False  # whether `update` returned keys that `attend` did not get
        self._cache: MobaCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the counter of columns. `attend`, which knows the block size, makes the rest."""
        if self.max_cache_len is not None:
            self.columns = storage((), torch.int64, key_states.device)
            _mark_static(self.columns)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns new keys and values, which the attention then appends.

        Args:
            key_states: New keys, ``(B, Hkv, L, D)``.
            value_states: New values, ``(B, Hkv, L, Dv)``.
            args: Ignored, like ``kwargs``.
            kwargs: Arguments for other caches.

        Returns:
            The keys and values, cast under autocast, with a reference to this layer.

        Raises:
            RuntimeError: The keys of the last call did not reach `attend`.
        """
        if self._is_unattended:
            raise RuntimeError(
                "a FlexMobaCache has keys that did not reach flexmoba's attention; load the model "
                'with attn_implementation="flexmoba" (see convert), use a cache of transformers if '
                "the model caches latents in place of keys, or call reset() on the cache after an "
                "exception"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.columns += key_states.shape[2]
        self._is_unattended = True
        # Cast here and not in the attention, so that layers that share keys get the same tensors.
        key, value = (x.to(autocast_dtype(x)) for x in (key_states, value_states))
        for x in (key, value):
            x.flexmoba_layer = self  # type: ignore[attr-defined]
        return key, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        block_size: int,
        topk: int | None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Appends the new keys and values, and attends to all tokens of the cache.

        Layers that share keys call it with the same keys, which are appended once.

        Args:
            query: Queries of the last ``Lq`` new tokens, ``(B, Hq, Lq, D)``. ``Lq`` is ``L``,
                except in layers that share keys.
            key: Keys from `update`, ``(B, Hkv, L, D)``.
            value: Values from `update`, ``(B, Hkv, L, Dv)``.
            real: ``(B, L)`` bool, False for padding; None if there is no padding.
            block_size: Keys in a block.
            topk: Blocks that each query attends to, its own block included; None for all blocks.
            options: Keyword arguments of `MobaCache.attend`, and ``gate_block_size``.

        Returns:
            The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.

        Raises:
            ValueError: The cache has another block size or gate block size.
            NotImplementedError: Layers share keys under ``gate="tile"``.
        """
        self._is_unattended = False
        options = dict(options)
        gate_block_size = options.pop("gate_block_size", None)
        if self._cache is None:
            self._cache = MobaCache(
                *(key.shape[0], key.shape[1], key.shape[3]),
                block_size=block_size,
                gate_block_size=gate_block_size,
                value_dim=value.shape[3],
                max_len=self.max_cache_len,
                dtype=key.dtype,
                device=key.device,
            )
            if self.max_cache_len is not None:
                for x in (self._cache.k, self._cache.v, self._cache.means, self._cache.lengths):
                    _mark_static(x)
        elif self._cache.block_size != block_size:
            raise ValueError(
                f"the cache holds mean keys of blocks of {self._cache.block_size} keys, but the "
                f"layer has block_size={block_size} now; make a new FlexMobaCache"
            )
        elif self._cache.gate_block_size != (gate_block_size or block_size):
            raise ValueError(
                f"the cache holds mean keys of sub-blocks of {self._cache.gate_block_size} keys, "
                f"but the layer has gate_block_size={gate_block_size} now; make a new FlexMobaCache"
            )
        positions: Tensor | None = getattr(key, "flexmoba_positions", None)
        if positions is None:
            if real is not None:
                self._padded_columns = self.columns if isinstance(self.columns, int) else 1
            positions = self._cache.append(key, value, real)
            key.flexmoba_positions = positions  # type: ignore[attr-defined]
        elif options.get("gate") == "tile":
            raise NotImplementedError(
                'gate="tile" keeps the queries of one layer in a cache, but several layers of this '
                "model share its keys; use another gate, or a cache of transformers"
            )
        positions = positions[:, positions.shape[1] - query.shape[2] :]
        return self._cache.attend(query, positions, topk, **options)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that the attention gets, the new ones, and their column."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        """Returns the number of columns so far; an int64 scalar tensor for a static cache."""
        return self.columns  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Returns the capacity in tokens, or -1 if the storage grows."""
        return self.max_cache_len or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns.

        Args:
            tokens_to_remove: Number of columns to remove, as a negative number or 0.

        Raises:
            ValueError: The number is positive, or the cache has fewer columns.
            NotImplementedError: A removed column may contain padding.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop expects the number of columns to remove as a negative number, got "
                f"{tokens_to_remove}; negate it"
            )
        if tokens_to_remove == 0 or self._cache is None:
            return
        left = self.columns + tokens_to_remove
        if isinstance(left, int) and left < 0:
            raise ValueError(
                f"the cache has {self.columns} columns, got crop({tokens_to_remove}); remove fewer"
            )
        if self._padded_columns and (not isinstance(left, int) or left < self._padded_columns):
            raise NotImplementedError(
                f"crop({tokens_to_remove}) may remove columns that came with padding; keep them, "
                "or make a new FlexMobaCache"
            )
        self.columns += tokens_to_remove
        self._cache.crop((self._cache.lengths + tokens_to_remove).clamp(min=0))

    def reset(self) -> None:
        """Removes all tokens, and keeps the storage."""
        self.columns *= 0
        self._padded_columns = 0
        self._is_unattended = False
        if self._cache is not None:
            self._cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row ``i`` by a copy of the old row ``beam_idx[i]``, ``(B,)`` int64."""
        if self._cache is not None:
            self._cache.reorder(beam_idx.to(self._cache.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times."""
        if self._cache is not None:
            rows = torch.arange(self._cache.lengths.shape[0], device=self._cache.lengths.device)
            self._cache.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, an integer tensor ``(rows,)``."""
        if self._cache is not None:
            self._cache.reorder(indices.to(self._cache.lengths.device))


def layer_of(x: Tensor) -> MobaLayer | None:
    """Returns the layer of a `FlexMobaCache` that returned these keys or values, or None."""
    layer: MobaLayer | None = getattr(x, "flexmoba_layer", None)
    return layer


def _mark_static(x: Tensor) -> None:
    # CUDA graphs may then write to `x`. Dynamo does not support the call while it traces.
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
