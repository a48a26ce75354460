"""A transformers cache whose layers keep block means, so that ``generate`` decodes sparsely."""

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
    """`MobaCache` for every layer of a transformers model with ``attn_implementation="flexmoba"``.

    Pass a new one to ``generate`` or to the model as ``past_key_values``. A step of decoding then
    reads mean keys and selected blocks (arXiv 2502.13189, Sec. 2.2) and nothing else. It serves
    greedy decoding, sampling, beam search, prefill in chunks, batches with padding on either side,
    and assisted decoding. Inference only.

    Args:
        max_cache_len: Tokens that each row has room for, the prompt included: storage that never
            moves, for ``torch.compile`` and CUDA graphs, into which ``generate`` compiles its
            steps on a GPU. None to grow as needed.
        config: The model's. Only models whose local layers keep a sliding window or chunks need it:
            these layers get a cache of transformers, which holds no more than a window.

    Raises:
        ValueError: ``max_cache_len`` is not positive.

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
        """Makes an empty cache; its layers are made as the model comes to them."""
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1 or None, got {max_cache_len}")
        self.max_cache_len = max_cache_len
        super().__init__(layer_class_to_replicate=partial(MobaLayer, max_cache_len))
        local = () if config is None else local_layers(config.get_text_config(decoder=True))
        if local:  # masks are made for the first layer of each kind, so layers must be there
            usual = (
                DynamicCache(config=config)
                if max_cache_len is None
                else StaticCache(config, max_cache_len)
            )
            self.layers = [
                layer if index in local else MobaLayer(max_cache_len)
                for index, layer in enumerate(usual.layers)
            ]

    @property
    def is_compileable(self) -> bool:
        """Whether steps can be compiled: they can if nothing has to grow."""
        return self.max_cache_len is not None

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that there is room for; -1 for no limit."""
        return self.max_cache_len or -1

    def _no_states(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "a FlexMobaCache holds keys and values, not the states of recurrent layers or "
            "convolutions; use a cache of transformers for this model"
        )

    get_conv_state = update_conv_state = _no_states
    get_recurrent_state = update_recurrent_state = _no_states


class MobaLayer(CacheLayerMixin):
    """The cache of one layer.

    A model calls `update` with new keys, and its attention right after that. Only the attention
    knows which of them are padding, so only it adds them: `update` hands the new keys on with this
    layer attached to them, where `layer_of` finds it.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None) -> None:
        """Makes an empty layer."""
        super().__init__()
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        # Columns that came so far, padding included, as transformers counts them. A tensor in a
        # static cache, since a number would compile anew with every step.
        self.columns: int | Tensor = 0
        self._padded = 0  # up to which column any of them may be padding; of a static cache, if any
        self._unattended = False
        self._cache: MobaCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the counter; what is stored waits for the attention, which knows the blocks."""
        if self.max_cache_len is not None:
            self.columns = storage((), torch.int64, key_states.device)
            _keep_in_place(self.columns)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands on new keys and values for the attention to add."""
        if self._unattended:
            raise RuntimeError(
                "keys that came into a FlexMobaCache before never came to flexmoba's attention: "
                'the model needs attn_implementation="flexmoba" (see convert), or a cache of '
                "transformers if it caches latents in place of keys; after an exception, the cache "
                "needs reset()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.columns += key_states.shape[2]
        self._unattended = True
        # Here, so that layers that share keys share what they become.
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
        """Adds the new keys and values, and attends to all that there are.

        Layers that share keys come with those of the first one, which are added once.

        Args:
            query: ``(B, Hq, L, D)``; of layers that share keys perhaps the last ones only.
            key: What `update` returned, ``(B, Hkv, L, D)``.
            value: Likewise, ``(B, Hkv, L, Dv)``.
            real: ``(B, L)`` bool, which of them are no padding; None for all of them.
            block_size: Keys in a block.
            topk: Blocks that each query attends to; None for all.
            options: Keyword arguments of `MobaCache.attend`.

        Returns:
            The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)``.
        """
        self._unattended = False
        if self._cache is None:
            self._cache = MobaCache(
                *(key.shape[0], key.shape[1], key.shape[3]),
                block_size=block_size,
                value_dim=value.shape[3],
                max_len=self.max_cache_len,
                dtype=key.dtype,
                device=key.device,
            )
            if self.max_cache_len is not None:
                for x in (self._cache.k, self._cache.v, self._cache.means, self._cache.lengths):
                    _keep_in_place(x)
        elif self._cache.block_size != block_size:
            raise ValueError(
                f"the cache holds means of blocks of {self._cache.block_size} keys, but the layer "
                f"has block_size={block_size} now; begin with a new FlexMobaCache"
            )
        positions: Tensor | None = getattr(key, "flexmoba_positions", None)
        if positions is None:
            if real is not None:
                self._padded = self.columns if isinstance(self.columns, int) else 1
            positions = self._cache.append(key, value, real)
            key.flexmoba_positions = positions  # type: ignore[attr-defined]
        elif options.get("gate") == "tile":
            raise NotImplementedError(
                'gate="tile" keeps the queries of one layer in a cache, and several layers of this '
                "model share its keys; use another gate, or no FlexMobaCache"
            )
        positions = positions[:, positions.shape[1] - query.shape[2] :]
        return self._cache.attend(query, positions, topk, **options)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the attention is given, and the column of the first: the new ones."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        """Columns that came so far; of a static cache a tensor."""
        return self.columns  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Tokens that there is room for; -1 for no limit."""
        return self.max_cache_len or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; transformers counts them by negative numbers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes how many columns to remove as a negative number, got "
                f"{tokens_to_remove}"
            )
        if tokens_to_remove == 0 or self._cache is None:
            return
        left = self.columns + tokens_to_remove
        if isinstance(left, int) and left < 0:
            raise ValueError(f"the cache has {self.columns} columns, got crop({tokens_to_remove})")
        if self._padded and (not isinstance(left, int) or left < self._padded):
            raise NotImplementedError(
                f"crop({tokens_to_remove}) may reach into columns that came with padding; keep "
                "them, or begin with a new FlexMobaCache"
            )
        self.columns += tokens_to_remove
        self._cache.crop((self._cache.lengths + tokens_to_remove).clamp(min=0))

    def reset(self) -> None:
        """Forgets all tokens, and keeps the storage."""
        self.columns *= 0
        self._padded = 0
        self._unattended = False
        if self._cache is not None:
            self._cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row ``i`` what row ``beam_idx[i]`` was."""
        if self._cache is not None:
            self._cache.reorder(beam_idx.to(self._cache.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self._cache is not None:
            rows = torch.arange(self._cache.lengths.shape[0], device=self._cache.lengths.device)
            self._cache.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        if self._cache is not None:
            self._cache.reorder(indices.to(self._cache.lengths.device))


def layer_of(x: Tensor) -> MobaLayer | None:
    """The layer of a `FlexMobaCache` that these keys or values have just come through, if any."""
    layer: MobaLayer | None = getattr(x, "flexmoba_layer", None)
    return layer


def _keep_in_place(x: Tensor) -> None:
    # So that CUDA graphs may write to it. Not while tracing, where it is unsupported.
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
