"""The short convolution on keys, and the cache that it decodes with."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.cache import MobaCache, check_new_tokens, check_no_gradients, storage
from flexmoba.checks import check_positive


class KeyConv(nn.Module):
    """A short causal convolution on keys: neighbours share what a block's mean tells of them.

    Computes ``k'_t = k_t + SiLU(sum_{l < W} W_l * k_{t - l})`` for every channel on its own
    (arXiv 2511.11571, App. C). The result takes the place of the keys, for the block means and for
    attention. Weights begin as zeros, which change no key, so that a trained model may be given
    one.

    Args:
        channels: Channels of all KV heads, ``Hkv * D``.
        width: Keys that each one is made of, itself included; the paper's 3 or 5.
        device: Where the weights are.
        dtype: Of the weights.

    Attributes:
        weight: ``(channels, width)``; column ``l`` is for the key ``l`` tokens before. Split over
            devices by channels, as a ``DTensor``, it convolves each device's own heads.

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
        """Makes it change no key."""
        nn.init.zeros_(self.weight)

    def forward(
        self, k: Tensor, positions: Tensor | None = None, cache: "KeyConvCache | None" = None
    ) -> Tensor:
        """The keys ``(B, Hkv, L, D)`` to attend to, in the dtype of ``k``.

        Args:
            k: Keys as projected, ``(B, Hkv, L, D)``.
            positions: Where each token stands in its sequence, ``(B or 1, L)`` ints, below 0 for
                padding: none mixes with what came before position 0. By default from 0 on, or
                where the cache ends.
            cache: What holds the keys before these, and keeps these at their positions.

        Raises:
            ValueError: The heads' channels are not the weight's.
        """
        weight: Tensor = self.weight
        if type(weight) not in (Tensor, nn.Parameter):  # tensor parallelism?
            from torch.distributed.tensor import DTensor  # slow to import, so not without need

            if isinstance(weight, DTensor):
                weight = weight.to_local()  # the channels of this device's heads
        if k.shape[1] * k.shape[3] != weight.shape[0]:
            raise ValueError(
                f"k must have {weight.shape[0]} channels, got {k.shape[1]} heads of {k.shape[3]}; "
                "under tensor parallelism split the convolution's weight like k_proj's"
            )
        precise = torch.promote_types(k.dtype, torch.float32)
        taps = weight.to(precise).view(k.shape[1], 1, k.shape[3], self.width).unbind(-1)
        mixed = k * taps[0]
        for tap, earlier in zip(taps[1:], self._earlier(k, positions, cache), strict=True):
            mixed = mixed + earlier * tap
        return (k + F.silu(mixed)).to(k.dtype)

    def _earlier(
        self, k: Tensor, positions: Tensor | None, cache: "KeyConvCache | None"
    ) -> Iterator[Tensor]:
        """The keys 1, 2 ... tokens before; zeros where there is none."""
        if cache is not None:
            positions = cache.next_positions(k.shape[2]) if positions is None else positions
            kept = cache.keep(k, positions)
        else:
            kept = F.pad(k, (0, 0, self.width - 1, 0))
        for lag in range(1, self.width):
            if cache is not None and positions is not None:
                at = (positions - lag).clamp(0, kept.shape[2] - 1).long()
                earlier = kept.gather(2, at[:, None, :, None].expand_as(k))
            else:
                earlier = kept.narrow(2, self.width - 1 - lag, k.shape[2])
            if positions is not None:
                earlier = earlier.masked_fill((positions < lag)[:, None, :, None], 0.0)
            yield earlier

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"channels={self.channels}, width={self.width}"


class KeyConvCache(MobaCache):
    """A `MobaCache` that keeps the keys as they were before a `KeyConv`, too.

    All of them, so that a row cropped to any length goes on as if it had ended there. Takes the
    arguments of a `MobaCache`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Makes an empty cache."""
        super().__init__(*args, **options)
        self.projected = storage(self.k.shape, self.k.dtype, self.k.device)

    def keep(self, k: Tensor, positions: Tensor) -> Tensor:
        """Remembers new keys ``(B, Hkv, n, D)`` at ``positions (B, n)``, and returns all."""
        check_new_tokens("k", k, self.k)
        check_no_gradients(k)
        self._make_room(k.shape[2])
        fits = (positions >= 0) & (positions < self.capacity)
        at = torch.where(fits, positions, self.capacity).long()[:, None, :, None]
        self.projected.scatter_(2, at.expand_as(k), k)
        return self.projected

    def reorder(self, rows: Tensor) -> None:
        """As `MobaCache.reorder`."""
        moved = self.projected.index_select(0, rows)
        super().reorder(rows)
        if moved.shape == self.projected.shape:
            self.projected.copy_(moved)  # in place, for CUDA graphs
        else:
            self.projected = storage(moved.shape, moved.dtype, moved.device).copy_(moved)

    def _make_room(self, n: int) -> None:
        super()._make_room(n)
        if self.projected.shape != self.k.shape:
            grown = storage(self.k.shape, self.k.dtype, self.k.device)
            grown[:, :, : self.projected.shape[2]] = self.projected
            self.projected = grown
