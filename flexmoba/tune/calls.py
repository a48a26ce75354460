"""The queries and keys that a model's attention sees, caught while it runs."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from flexmoba.nn import FlexMoba

MAX_NAMES = 4  # of layers in a message
_NO_LIMIT = 1 << 30
# Why a call is left out.
_SHAPES = "shapes other than (B, H, L, D) of as many queries as keys, two at least"
_NO_MASK = "no causal mask"
_MASK = "a mask other than the causal one (a window, padding, documents), or a bias on scores"
_CONVERTED = "a model converted to flexmoba"
# Options of `flex_moba` under which a call is not plain causal self-attention of whole sequences.
_NOT_PLAIN = ("cu_seqlens", "document_ids", "key_padding_mask", "cache", "score_mod")


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
    plain causal self-attention: as many queries as keys, more than one, and ``is_causal`` or a mask
    that shows each kept query all keys up to its own and no other, without a bias or a
    ``score_mod`` that changes its scores. All others are left out with a warning that names their
    layers: those with a window, with padding, with packed documents, with a cache; and those of
    transformers models after ``convert``.

    Args:
        model: Any module. Call it inside the ``with`` block, with gradients or without.
        queries: How many queries of each call to keep, spread over the sequence; all keys are.
        device: Where to keep them; where they are, by default. ``"cpu"`` spares GPU memory.

    Yields:
        The list of calls, filled while the model runs. The mask of a call inside ``torch.compile``
        is judged at the end of the block.

    Raises:
        ValueError: The block ended without a call to keep.

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
    converted = {
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "flexmoba"
    }
    seen = _Seen(queries, device, converted)
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
        # Each call inside torch.compile is another program, as it ends in another entry of a list.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_NO_LIMIT))
        stack.enter_context(torch._dynamo.config.patch(accumulated_recompile_limit=_NO_LIMIT))
        with seen:
            yield seen.calls
    seen.judge()
    reasons = seen.reasons()
    if not seen.calls:
        raise ValueError(
            f"no plain causal self-attention was seen ({reasons or 'no attention call'}); the "
            "model must call scaled_dot_product_attention, flex_attention or flexmoba.nn.FlexMoba "
            "on whole sequences inside the block, without a window, padding, documents or a cache; "
            'a model of transformers does if loaded with attn_implementation="sdpa"'
        )
    if reasons:
        warnings.warn(f"capture left out attention calls: {reasons}", stacklevel=3)


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

    def __init__(
        self, queries: int, device: torch.device | str | None, converted: set[str]
    ) -> None:
        super().__init__()
        self.queries, self.device = queries, device
        self.converted = converted  # names of transformers modules that dispatch to flexmoba
        self.calls: list[Call] = []
        self.plain: list[Tensor | bool] = []  # whether each call's mask is the causal one
        self.left_out: list[tuple[str, str]] = []  # names and reasons
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
        if is_causal or isinstance(attn_mask, CausalBias):
            self.keep(query, key, scale)
        elif attn_mask is None:
            self.leave_out(_NO_MASK)
        else:
            self.keep(query, key, scale, functools.partial(_is_causal_mask, attn_mask))

    def flex(
        self,
        q: Tensor,
        k: Tensor,
        v: Any,
        score_mod: Any,
        mask: Any,
        scale: float,
        options: Any = None,
        score_buffers: Any = (),
        mask_buffers: Any = (),
    ) -> None:
        def plain(positions: Tensor) -> Tensor:
            def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                seen = mask[-1](b, h, i, j, *mask_buffers)
                score = torch.full_like(j, 0.7, dtype=q.dtype)
                unchanged = score_mod(score, b, h, i, j, *score_buffers) == score
                plain: Tensor = (seen == (j <= i)) & (unchanged | ~seen)
                return plain

            return _of_each(same, q.shape[0], q.shape[1], positions, k.shape[2]).all()

        self.keep(q, k, scale, plain)

    def flex_moba(self, module: FlexMoba, args: Any, kwargs: Any) -> None:
        def given(
            q: Tensor, k: Tensor, v: Tensor, **options: Any
        ) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return q, k, module.options | options

        q, k, options = given(*args, **kwargs)
        parts = [name for name in _NOT_PLAIN if options.get(name) is not None]
        if parts:
            self.leave_out(f"called with {' and '.join(parts)}")
        elif not options.get("is_causal", True):
            self.leave_out(_NO_MASK)
        else:
            self.keep(q, k, options.get("scale"))
        self.inside.append(self.names[-1])

    def keep(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        plain: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keeps a call if its mask is causal: where that is not sure, ``plain(positions)`` tells.

        It tells by a tensor, which inside torch.compile nobody can read yet.
        """
        if self.inside:
            return
        if self.caller() in self.converted:  # a local layer: converted ones call a function
            self.leave_out(_CONVERTED)
            return
        if q.dim() != 4 or not 1 < q.shape[2] == k.shape[2]:
            self.leave_out(_SHAPES)
            return
        positions = sample_positions(q.shape[2], self.queries)
        at = positions.to(q.device)
        causal = True if plain is None else plain(at)
        if not torch.compiler.is_compiling() and not causal:
            self.leave_out(_MASK)
            return
        self.plain.append(causal)
        self.calls.append(
            Call(
                name=self.caller(),
                q=q.detach()[:, :, at].to(self.device or q.device),
                k=k.detach().to(self.device or k.device, copy=True),
                positions=positions,
                scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            )
        )

    def leave_out(self, reason: str) -> None:
        if not self.inside:
            self.left_out.append((self.caller(), reason))

    def caller(self) -> str:
        return self.names[-1] if self.names else ""

    def judge(self) -> None:
        """Leaves out what was kept inside torch.compile and has another mask."""
        judged = list(zip(self.calls, map(bool, self.plain), strict=True))
        self.calls[:] = [call for call, causal in judged if causal]
        self.left_out += [(call.name, _MASK) for call, causal in judged if not causal]

    def reasons(self) -> str:
        """Why calls were left out, and of which layers."""
        layers: dict[str, dict[str, None]] = {}
        for name, reason in self.left_out:
            layers.setdefault(reason, {})[name or "the model itself"] = None
        texts = []
        for reason, names in layers.items():
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            texts.append(f"{reason}, of {', '.join(list(names)[:MAX_NAMES])}{more}")
        return "; ".join(texts)


def _is_causal_mask(mask: Tensor, positions: Tensor) -> Tensor:
    """Whether queries at ``positions`` see all keys up to their own and no other, unbiased."""
    length = mask.shape[-1]
    rows = mask.expand(*mask.shape[:-2], length, length)[..., positions, :]
    past = torch.arange(length, device=mask.device) <= positions[:, None]
    if mask.dtype == torch.bool:
        return (rows == past).all()
    return torch.where(past, rows == 0, rows <= torch.finfo(mask.dtype).min / 2).all()


def _of_each(
    function: Callable[..., Tensor], batch: int, heads: int, positions: Tensor, length: int
) -> Tensor:
    """A function of single (b, h, i, j), as FlexAttention calls a mask_mod, of all of them."""
    for dims in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0,) + 3 * (None,),
    ):
        function = torch.vmap(function, in_dims=dims)
    b, h, j = (torch.arange(n, device=positions.device) for n in (batch, heads, length))
    return function(b, h, positions, j)
