"""Records the queries and keys of a model's attention calls while the model runs."""

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

MAX_NAMES = 4  # layers that a message names for each reason
_NO_LIMIT = 1 << 30
# Reasons to skip a call.
_SHAPES = "shapes other than (B, H, L, D) with as many queries as keys, at least two"
_NO_MASK = "no causal mask"
_MASK = "a mask other than the causal one (a window, padding, documents), or a bias on the scores"
_CONVERTED = "a model converted to flexmoba"
# With any of these options of `flex_moba`, a call is not plain causal self-attention.
_NOT_PLAIN = ("cu_seqlens", "document_ids", "key_padding_mask", "cache", "score_mod")


@dataclass
class Call:
    """A recorded call of causal self-attention.

    Attributes:
        name: The innermost module that made the call, as in ``model.named_modules()``.
        q: A sample of its queries, ``(B, Hq, n, D)``.
        k: Its keys, ``(B, Hkv, L, D)``, in the dtype of ``q``.
        positions: The position of each of these queries among the keys, int64 ``(n,)``.
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
    """Records queries and keys of the attention calls of a model, in the order of the calls.

    It intercepts ``scaled_dot_product_attention`` and ``flex_attention``, also inside
    ``torch.compile``, and `flexmoba.nn.FlexMoba` modules. It does not intercept other kernels,
    ``torch.nn.MultiheadAttention``, or `flex_moba` called as a function. It keeps a call if the
    call is plain causal self-attention: it has as many queries as keys, at least two, and
    ``is_causal`` or a mask that shows each kept query exactly the keys up to its position, without
    a bias or a ``score_mod`` that changes its scores. It skips all other calls, with a warning
    that names their layers: calls with a window, padding, packed documents or a cache, and calls
    of transformers models after ``convert``.

    Args:
        model: Any module. Call it inside the ``with`` block, with or without gradients.
        queries: Number of queries to keep of each call, spread over the sequence. All keys are
            kept.
        device: Device for the kept tensors, by default the device of the call. ``"cpu"`` saves GPU
            memory.

    Yields:
        The list of calls, filled while the model runs. For a call inside ``torch.compile``, the
        mask is checked at the end of the block.

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
    recorder = _Recorder(queries, device, converted)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hooks = [
                module.register_forward_pre_hook(functools.partial(recorder.enter, name)),
                module.register_forward_hook(recorder.leave, always_call=True),
            ]
            if isinstance(module, FlexMoba):
                hook = module.register_forward_pre_hook(recorder.flex_moba, with_kwargs=True)
                hooks.append(hook)
            for hook in hooks:
                stack.callback(hook.remove)
        # Each attention call inside torch.compile appends to a list of another length, so dynamo
        # compiles it anew.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_NO_LIMIT))
        stack.enter_context(torch._dynamo.config.patch(accumulated_recompile_limit=_NO_LIMIT))
        with recorder:
            yield recorder.calls
    recorder.check_masks()
    reasons = recorder.reasons()
    if not recorder.calls:
        raise ValueError(
            f"capture found no plain causal self-attention ({reasons or 'no attention call'}); "
            "inside the block, call scaled_dot_product_attention, flex_attention or "
            "flexmoba.nn.FlexMoba on complete sequences, without a window, padding, documents or a "
            'cache; load a model of transformers with attn_implementation="sdpa"'
        )
    if reasons:
        warnings.warn(f"capture skipped attention calls: {reasons}", stacklevel=3)


def sample_positions(length: int, queries: int) -> Tensor:
    """Returns sample positions, int64 ``(min(queries, length),)``, one in each equal interval.

    The offset in the interval follows the golden ratio, so the samples do not align with blocks of
    any size.
    """
    if queries < 1:
        raise ValueError(
            f"queries must be at least 1, got {queries}; pass a positive number, such as 256"
        )
    if queries >= length:
        return torch.arange(length)
    ends = torch.arange(queries + 1) * length // queries
    share = torch.arange(queries, dtype=torch.float64) * 0.6180339887498949 % 1
    return ends[:-1] + (share * ends.diff()).long()


class _Recorder(TorchFunctionMode):
    """A mode that intercepts attention functions of torch; dynamo traces it like other code."""

    def __init__(
        self, queries: int, device: torch.device | str | None, converted: set[str]
    ) -> None:
        super().__init__()
        self.queries, self.device = queries, device
        self.converted = converted  # names of transformers modules that dispatch to flexmoba
        self.calls: list[Call] = []
        self.is_causal: list[Tensor | bool] = []  # for each call, whether its mask is causal
        self.skipped: list[tuple[str, str]] = []  # names and reasons
        self.names: list[str] = []  # the modules that run now, innermost last
        self.inside: list[str] = []  # FlexMoba modules that run now; their inner calls do not count

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
            self.skip(_NO_MASK)
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
        def is_causal(positions: Tensor) -> Tensor:
            def pair_is_causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                visible = mask[-1](b, h, i, j, *mask_buffers)
                score = torch.full_like(j, 0.7, dtype=q.dtype)
                unchanged = score_mod(score, b, h, i, j, *score_buffers) == score
                is_plain: Tensor = (visible == (j <= i)) & (unchanged | ~visible)
                return is_plain

            pairs = _for_all_pairs(pair_is_causal, q.shape[0], q.shape[1], positions, k.shape[2])
            return pairs.all()

        self.keep(q, k, scale, is_causal)

    def flex_moba(self, module: FlexMoba, args: Any, kwargs: Any) -> None:
        def split_arguments(
            q: Tensor, k: Tensor, v: Tensor, **options: Any
        ) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return q, k, module.options | options

        q, k, options = split_arguments(*args, **kwargs)
        given = [name for name in _NOT_PLAIN if options.get(name) is not None]
        if given:
            self.skip(f"called with {' and '.join(given)}")
        elif not options.get("is_causal", True):
            self.skip(_NO_MASK)
        else:
            self.keep(q, k, options.get("scale"))
        self.inside.append(self.names[-1])

    def keep(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        is_causal: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keeps a call if its mask is causal.

        ``is_causal(positions)`` computes that as a bool tensor ``()``, which cannot be read inside
        ``torch.compile``; None means that the mask is causal.
        """
        if self.inside:
            return
        if self.caller() in self.converted:  # a layer that kept its window
            self.skip(_CONVERTED)
            return
        if q.dim() != 4 or not 1 < q.shape[2] == k.shape[2]:
            self.skip(_SHAPES)
            return
        positions = sample_positions(q.shape[2], self.queries)
        index = positions.to(q.device)
        causal = True if is_causal is None else is_causal(index)
        if not torch.compiler.is_compiling() and not causal:
            self.skip(_MASK)
            return
        self.is_causal.append(causal)
        self.calls.append(
            Call(
                name=self.caller(),
                q=q.detach()[:, :, index].to(self.device or q.device),
                k=k.detach().to(self.device or k.device, copy=True),
                positions=positions,
                scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            )
        )

    def skip(self, reason: str) -> None:
        if not self.inside:
            self.skipped.append((self.caller(), reason))

    def caller(self) -> str:
        return self.names[-1] if self.names else ""

    def check_masks(self) -> None:
        """Removes calls that were kept inside torch.compile and whose mask is not causal."""
        checked = list(zip(self.calls, map(bool, self.is_causal), strict=True))
        self.calls[:] = [call for call, causal in checked if causal]
        self.skipped += [(call.name, _MASK) for call, causal in checked if not causal]

    def reasons(self) -> str:
        """Returns the reasons for skipped calls, each with its layers, as text."""
        layers: dict[str, dict[str, None]] = {}
        for name, reason in self.skipped:
            layers.setdefault(reason, {})[name or "the model itself"] = None
        texts = []
        for reason, names in layers.items():
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            texts.append(f"{reason}, in {', '.join(list(names)[:MAX_NAMES])}{more}")
        return "; ".join(texts)


def _is_causal_mask(mask: Tensor, positions: Tensor) -> Tensor:
    """Returns whether a mask shows queries at ``positions`` exactly the keys up to theirs."""
    length = mask.shape[-1]
    rows = mask.expand(*mask.shape[:-2], length, length)[..., positions, :]
    past = torch.arange(length, device=mask.device) <= positions[:, None]
    if mask.dtype == torch.bool:
        return (rows == past).all()
    return torch.where(past, rows == 0, rows <= torch.finfo(mask.dtype).min / 2).all()


def _for_all_pairs(
    function: Callable[..., Tensor], batch: int, heads: int, positions: Tensor, length: int
) -> Tensor:
    """Maps a function of scalars ``(b, h, i, j)``, like a mask_mod, over rows, heads and pairs."""
    for dims in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0,) + 3 * (None,),
    ):
        function = torch.vmap(function, in_dims=dims)
    b, h, j = (torch.arange(n, device=positions.device) for n in (batch, heads, length))
    return function(b, h, positions, j)
