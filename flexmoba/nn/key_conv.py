"""`KeyConv`, a short convolution on keys, and `KeyConvCache`, its cache for decoding."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.cache import MobaCache, check_new_tokens, check_no_gradients, storage
from flexmoba.checks import check_positive


class KeyConv(nn.Module):
    """Short causal convolution on keys, which makes neighbouring keys more similar.

    Computes ``k'_t = k_t + SiLU(sum_{l < width} W_l * k_{t - l})`` for every channel separately
    (arXiv 2511.11571, App. C). The result replaces the key in the mean keys and in attention. The
    weights are initially 0, which changes no key, so a convolution can be added to a trained model.

    Args:
        channels: Channels of all KV heads, ``Hkv * D``.
        width: Keys that contribute to each result, the key itself included; 3 or 5, as in the
            paper.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Attributes:
        weight: Parameter, ``(channels, width)``. Column ``l`` multiplies the key ``l`` tokens
            earlier. As a ``DTensor`` that is sharded by channels, it applies to the heads of each
            device.

    Raises:
        ValueError: ``width`` is not 3 or 5, or ``channels`` is not positive.

    Examples:
        >>> import torch
        >>> from flexmoba.nn import KeyConv
        >>> convolve = KeyConv(channels=32, width=3)
        >>> k = torch.randn(1, 2, 100, 16)
        >>> convolve(k).shape
        torch.Size([1, 2, 100, 16])
    """

    def __init__(
        self,
        channels: int,
        width: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the weights."""
        super().__init__()
        if width not in (3, 5) or not isinstance(width, int):
            raise ValueError(f"width of a key convolution must be 3 or 5, got {width!r}")
        check_positive("channels", channels, "pass KV heads times head dim")
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to 0, so that the convolution changes no key."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        k: Tensor,
        positions: Tensor | None = None,
        cache: "KeyConvCache | None" = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Returns the convolved keys.

        Args:
            k: Projected keys, before a rotary embedding, ``(B, Hkv, L, D)``.
            positions: Position of each token in its sequence, ``(B or 1, L)``, an integer dtype;
                negative for padding. A key mixes only with keys from position 0 on. By default,
                positions begin at 0, or at the lengths of the cache.
            cache: Cache of the earlier keys, which also stores these keys at their positions.
            before: Without a cache, the keys right before ``k``, ``(B, Hkv, width - 1, D)``; zeros
                by default.

        Returns:
            ``(B, Hkv, L, D)`` in the dtype of ``k``.

        Raises:
            ValueError: ``Hkv * D`` differs from the channels of the weight.
        """
        weight: Tensor = self.weight
        if type(weight) not in (Tensor, nn.Parameter):  # a DTensor under tensor parallelism
            from torch.distributed.tensor import DTensor  # lazily, since the import is slow

            if isinstance(weight, DTensor):
                weight = weight.to_local()  # the channels of the heads of this device
        if k.shape[1] * k.shape[3] != weight.shape[0]:
            raise ValueError(
                f"k must have {weight.shape[0]} channels, got {k.shape[1]} heads of {k.shape[3]}; "
                "under tensor parallelism, split the weight of the convolution like k_proj.weight"
            )
        precise = torch.promote_types(k.dtype, torch.float32)
        taps = weight.to(precise).view(k.shape[1], 1, k.shape[3], self.width).unbind(-1)
        mixed = k * taps[0]
        for tap, earlier in zip(taps[1:], self._earlier(k, positions, cache, before), strict=True):
            mixed = mixed + earlier * tap
        return (k + F.silu(mixed)).to(k.dtype)

    def _earlier(
        self,
        k: Tensor,
        positions: Tensor | None,
        cache: "KeyConvCache | None",
        before: Tensor | None,
    ) -> Iterator[Tensor]:
        """Yields the keys 1, 2, ... ``width - 1`` tokens earlier, or zeros, ``(B, Hkv, L, D)``."""
        if cache is not None:
            positions = cache.next_positions(k.shape[2]) if positions is None else positions
            stored = cache.keep(k, positions)
        elif before is not None:
            stored = torch.cat([before, k], dim=2)
        else:
            stored = F.pad(k, (0, 0, self.width - 1, 0))
        for lag in range(1, self.width):
            if cache is not None and positions is not None:
                index = (positions - lag).clamp(0, stored.shape[2] - 1).long()
                earlier = stored.gather(2, index[:, None, :, None].expand_as(k))
            else:
                earlier = stored.narrow(2, self.width - 1 - lag, k.shape[2])
            if positions is not None:
                earlier = earlier.masked_fill((positions < lag)[:, None, :, None], 0.0)
            yield earlier

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        return f"channels={self.channels}, width={self.width}"


class KeyConvCache(MobaCache):
    """`MobaCache` that also keeps the keys from before a `KeyConv`.

    It keeps all of them, which makes any `crop` correct. Takes the arguments of `MobaCache`.

    Attributes:
        projected: Keys before the convolution, in the shape and dtype of ``k``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Makes an empty cache."""
        super().__init__(*args, **options)
        self.projected = storage(self.k.shape, self.k.dtype, self.k.device)

    def keep(self, k: Tensor, positions: Tensor) -> Tensor:
        """Stores projected keys, and returns all of them.

        Args:
            k: New projected keys, ``(B, Hkv, n, D)`` in the dtype of the cache.
            positions: Their positions, ``(B, n)`` int32; -1 for padding.

        Returns:
            ``projected``, ``(B, Hkv, N * block_size, D)``.
        """
        check_new_tokens("k", k, self.k)
        check_no_gradients(k)
        self._make_room(k.shape[2])
        fits = (positions >= 0) & (positions < self.capacity)
        index = torch.where(fits, positions, self.capacity).long()[:, None, :, None]
        self.projected.scatter_(2, index.expand_as(k), k)
        return self.projected

    def reorder(self, rows: Tensor) -> None:
        """Replaces row ``i`` by a copy of the old row ``rows[i]``; see `MobaCache.reorder`."""
        moved = self.projected.index_select(0, rows)
        super().reorder(rows)
        if moved.shape == self.projected.shape:
            self.projected.copy_(moved)  # in place, because CUDA graphs record the address
        else:
            self.projected = storage(moved.shape, moved.dtype, moved.device).copy_(moved)

    def _make_room(self, n: int) -> None:
        super()._make_room(n)
        if self.projected.shape != self.k.shape:
            grown = storage(self.k.shape, self.k.dtype, self.k.device)
            grown[:, :, : self.projected.shape[2]] = self.projected
            self.projected = grown
