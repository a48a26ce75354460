"""The queries and keys that a model's attention sees, caught while it runs."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flexmoba.nn import FlexMoba

_NO_BLOCK_MASK = 1 << 30  # the size of the one block that FlexAttention makes up without a mask
# Options of `flex_moba` under which a call's keys are not those of one whole sequence.
_PARTS = ("cu_seqlens", "document_ids", "key_padding_mask", "cache")


@dataclass
class Call:
    """One call of causal self-attention.

    Attributes:
        name: The innermost module that made the call, as in ``model.named_modules()``.
        q: A sample of its queries, ``(B, Hq, n, D)``.
        k: Its keys, ``(B, Hkv, L, D)``.
        positions: Where those queries stand among the keys, int64 ``(n,)``.
        scale: Factor on the attention scores.
    """

    name: str
    q: Tensor
    k: Tensor
    positions: Tensor
    scale: float


@contextmanager
def capture(
    model: nn.Module, *, queries: int = 256, device: torch.device | str | None = None
) -> Iterator[list[Call]]:
    """Catches queries and keys of the attention calls that a model makes, in their order.

    Seen are calls of ``scaled_dot_product_attention`` and ``flex_attention``, also inside
    ``torch.compile``, and of `flexmoba.nn.FlexMoba` modules; not those of other kernels, of
    ``torch.nn.MultiheadAttention``, or of `flex_moba` called as a function. Kept are those of
    causal self-attention: as many queries as keys, more than one, and ``is_causal`` or a mask that
    hides from each query the next key. What else a mask hides is not looked at, and inside
    ``torch.compile`` and of a ``BlockMask`` nothing is: batches should have no padding and no
    packed documents. Calls of `flexmoba.nn.FlexMoba` with those, or with a cache, are left out.

    Args:
        model: Any module. Call it inside the ``with`` block, with gradients or without.
        queries: How many queries of each call to keep, spread over the sequence; all keys are.
        device: Where to keep them; where they are, by default. ``"cpu"`` spares GPU memory.

    Yields:
        The list of calls, filled while the model runs.

    Raises:
        ValueError: The block ended without any such call.

    Examples:
        >>> import torch
        >>> from flexmoba.tune import capture
        >>> from flexmoba.nn import FlexMoba
        >>> model = FlexMoba(block_size=64, topk=3)
        >>> with capture(model, queries=32) as calls:
        ...     out = model(*torch.randn(3, 1, 2, 500, 16))
        >>> calls[0].q.shape, calls[0].k.shape
        (torch.Size([1, 2, 32, 16]), torch.Size([1, 2, 500, 16]))
    """
    seen = _Seen(queries, device)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hooks = [
                module.register_forward_pre_hook(functools.partial(seen.enter, name)),
                module.register_forward_hook(seen.leave, always_call=True),
            ]
            if isinstance(module, FlexMoba):
                hook = module.register_forward_pre_hook(seen.flex_moba, with_kwargs=True)
                hooks.append(hook)
            for hook in hooks:
                stack.callback(hook.remove)
        with seen:
            yield seen.calls
    if not seen.calls:
        raise ValueError(
            f"no causal self-attention was seen ({seen.others} other attention calls): the model "
            "must call scaled_dot_product_attention, flex_attention or flexmoba.nn.FlexMoba on "
            "whole sequences inside the block, without padding, documents or a cache; a "
            "model of transformers does if loaded with "
            'attn_implementation="sdpa"'
        )


def sample_positions(length: int, queries: int) -> Tensor:
    """Positions of ``queries`` of ``length`` queries, int64, one out of each equal stretch.

    Where in its stretch goes by the golden ratio, and so keeps no step with any block size.
    """
    if queries < 1:
        raise ValueError(
            f"queries must be at least 1, got {queries}; 256 of a sequence tell enough"
        )
    if queries >= length:
        return torch.arange(length)
    ends = torch.arange(queries + 1) * length // queries
    share = torch.arange(queries, dtype=torch.float64) * 0.6180339887498949 % 1
    return ends[:-1] + (share * ends.diff()).long()


class _Seen(TorchFunctionMode):
    """Sees the functions of torch that are called; dynamo traces it like other code."""

    def __init__(self, queries: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.queries, self.device = queries, device
        self.calls: list[Call] = []
        self.others = 0
        self.names: list[str] = []
        self.inside: list[str] = []  # FlexMoba modules, whose own calls are not the model's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.sdpa(*args, **kwargs)
        elif func is torch.ops.higher_order.flex_attention:
            self.flex(*args, **kwargs)
        return func(*args, **kwargs)

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.names.append(name)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        name = self.names.pop()
        if self.inside and self.inside[-1] == name:
            self.inside.pop()

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.keep(query, key, scale, masked=is_causal or _hides_the_next(attn_mask))

    def flex(
        self, query: Tensor, key: Tensor, value: Any, mod: Any, mask: Any, scale: float, *_: Any
    ) -> None:
        self.keep(query, key, scale, masked=mask[-2] < _NO_BLOCK_MASK)

    def flex_moba(self, module: FlexMoba, args: Any, kwargs: Any) -> None:
        def given(
            q: Tensor, k: Tensor, v: Tensor, **options: Any
        ) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return q, k, module.options | options

        q, k, options = given(*args, **kwargs)
        whole = all(options.get(name) is None for name in _PARTS)
        self.keep(q, k, options.get("scale"), masked=whole and options.get("is_causal", True))
        self.inside.append(self.names[-1])

    def keep(self, q: Tensor, k: Tensor, scale: float | None, *, masked: bool) -> None:
        if self.inside:
            return
        if q.dim() != 4 or not masked or not 1 < q.shape[2] == k.shape[2]:
            self.others += 1
            return
        positions = sample_positions(q.shape[2], self.queries)
        sampled = q.detach()[:, :, positions.to(q.device)]
        self.calls.append(
            Call(
                name=self.names[-1] if self.names else "",
                q=sampled.to(self.device or q.device),
                k=k.detach().to(self.device or k.device, copy=True),
                positions=positions,
                scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            )
        )


def _hides_the_next(mask: Tensor | None) -> bool:
    """Whether no query sees the key after it: so a causal mask is told from one of padding."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] < 2:
        return False
    if torch.compiler.is_compiling():  # which cannot read values
        return True
    following = mask.diagonal(1, -2, -1)
    seen = following if mask.dtype == torch.bool else following > torch.finfo(mask.dtype).min / 2
    return not bool(seen.any())
