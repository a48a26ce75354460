"""The exchange by gathering: each rank gets the keys and values of all tokens.

A rank attends from its queries to the keys up to its own last token, one chunk of KV heads at a
time. Meanwhile, the keys and values of the next chunk are under way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from flexmoba.distributed.attend import Attention
from flexmoba.distributed.ranks import Pending, Ranks, all_gather, all_to_all
from flexmoba.runtime import no_second_derivatives

# Bytes of the gathered keys and values of a chunk of KV heads. A chunk has at least one KV head.
_BYTES_AT_ONCE = 2**28


def attend_by_gathering(
    q: Tensor, k: Tensor, v: Tensor, attention: Attention, ranks: Ranks, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of this rank's queries; see `context_parallel_moba`.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention.
        ranks: The ranks.
        with_lse: Whether to return the log-sum-exp.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)`` or None.
    """
    call = _Call(attention, ranks, _chunks(k, v, ranks), q.shape[1] // k.shape[1], with_lse)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        results = _GatheredAttention.apply(q, k, v, call)  # type: ignore[no-untyped-call]
    else:
        results = _attend(q, k, v, call)
    return results if with_lse else (results[0], None)


class _Call(NamedTuple):
    """The arguments of a call that are not tensors.

    Attributes:
        attention: The attention.
        ranks: The ranks.
        chunks: The first KV head of each chunk, and the KV head after its last one.
        group: Number of query heads of a KV head.
        with_lse: Whether the log-sum-exp is a result.
    """

    attention: Attention
    ranks: Ranks
    chunks: list[tuple[int, int]]
    group: int
    with_lse: bool

    def of_queries(self, chunk: int) -> slice:
        """Returns the query heads of a chunk."""
        first, end = self.chunks[chunk]
        return slice(first * self.group, end * self.group)


def _chunks(k: Tensor, v: Tensor, ranks: Ranks) -> list[tuple[int, int]]:
    """Divides the KV heads, in the same way on all ranks."""
    batch, heads, _, dim = k.shape
    features = batch * (dim + v.shape[-1])
    per_head = max(1, ranks.size * ranks.longest * features * k.element_size())
    at_once = max(1, _BYTES_AT_ONCE // per_head)
    return [(first, min(first + at_once, heads)) for first in range(0, heads, at_once)]


# ---- Forward ------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    """Computes the results without a graph."""
    results: list[tuple[Tensor, ...]] = []

    def attend(chunk: int, keys: Tensor, values: Tensor) -> None:
        heads = call.of_queries(chunk)
        results.append(call.attention(q[:, heads], keys, values, first_head=heads.start))

    _for_each_chunk(k, v, call, attend)
    return _joined(results, call)


def _joined(results: list[tuple[Tensor, ...]], call: _Call) -> tuple[Tensor, ...]:
    outs, lses = zip(*results, strict=True)
    return (torch.cat(outs, 1), torch.cat(lses, 1)) if call.with_lse else (torch.cat(outs, 1),)


def _for_each_chunk(
    k: Tensor, v: Tensor, call: _Call, function: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Calls ``function(chunk, keys, values)`` while the next chunk is under way.

    The gathered tensors of a chunk exist until its call returns, so that at most two chunks exist.
    """
    following: Pending | None = _start_gathering(k, v, call, 0)
    for chunk in range(len(call.chunks)):
        assert following is not None
        arranged = _arranged(following.wait(), call.ranks, k.shape[-1])
        following = None  # frees the received tensor before the next one is allocated
        if chunk + 1 < len(call.chunks):
            following = _start_gathering(k, v, call, chunk + 1)
        function(chunk, *arranged)
        del arranged


def _start_gathering(k: Tensor, v: Tensor, call: _Call, chunk: int) -> Pending:
    """Starts to gather keys and values, side by side, of shards padded to the longest one."""
    first, end = call.chunks[chunk]
    ranks, dim = call.ranks, k.shape[-1]
    mine = k.new_empty((k.shape[0], end - first, ranks.longest, dim + v.shape[-1]))
    mine[:, :, : ranks.length, :dim] = k[:, first:end]
    mine[:, :, : ranks.length, dim:] = v[:, first:end]
    return all_gather(mine, ranks.group, ranks.size)


def _arranged(gathered: Tensor, ranks: Ranks, dim: int) -> tuple[Tensor, Tensor]:
    """Returns contiguous keys and values up to this rank's last token."""
    shards = [
        gathered[rank, :, :, :length] for rank, length in enumerate(ranks.lengths[: ranks.rank + 1])
    ]
    keys = torch.cat([x[..., :dim] for x in shards], dim=2)
    return keys, torch.cat([x[..., dim:] for x in shards], dim=2)


# ---- Backward -----------------------------------------------------------------------------------


class _GatheredAttention(torch.autograd.Function):
    """The attention of all chunks; the backward gathers the keys and values again.

    Each chunk has a graph of its own, made in the forward and run in the backward. The graphs keep
    no tensors: gathered tensors are replaced by marks, and all others are saved in the context of
    this function, so that hooks such as those of activation checkpointing apply to them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Any:
        saved = _SavedTensors()
        graphs: list[_Graph] = []
        results: list[tuple[Tensor, ...]] = []

        def attend(chunk: int, keys: Tensor, values: Tensor) -> None:
            heads = call.of_queries(chunk)
            saved.keys, saved.values = keys, values
            with torch.enable_grad(), saved_tensors_hooks(saved.pack, saved.unpack):
                anchor = torch.empty(0, device=q.device, requires_grad=True)
                shards = q.detach()[:, heads], keys, values
                inputs = [_Input.apply(x, anchor) for x in shards]  # type: ignore[no-untyped-call]
                result = call.attention(*inputs, first_head=heads.start)
            if call.attention.score_mod is not None:
                _check_captured(result[0], anchor)
            graphs.append(
                _Graph(
                    tuple(map(get_gradient_edge, result[: 1 + call.with_lse])),
                    tuple(map(get_gradient_edge, inputs)),
                )
            )
            results.append(tuple(x.detach() for x in result))
            saved.release()

        _for_each_chunk(k, v, call, attend)
        ctx.save_for_backward(q, k, v, *saved.tensors)
        saved.tensors = ()
        ctx.call, ctx.saved, ctx.graphs = call, saved, graphs
        return _joined(results, call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = ctx.saved_tensors
        with torch.no_grad():
            results = _gradients(ctx, tensors, grads)
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (*tensors[:3], *grads)
            results = tuple(x if x is None else _last_derivative(x, *inputs) for x in results)
        return *results, None


def _gradients(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of q, k and v, or None for those that need none."""
    call, saved = ctx.call, ctx.saved
    _, k, v, *saved.tensors = tensors
    needs_q, needs_k, needs_v, _ = ctx.needs_input_grad
    dq: list[Tensor] = []
    reduced: list[tuple[Tensor, Tensor]] = []
    under_way: list[_Reducing] = []

    def attend(chunk: int, keys: Tensor, values: Tensor) -> None:
        saved.keys, saved.values = keys, values
        outputs, inputs = ctx.graphs[chunk]
        heads = call.of_queries(chunk)
        inputs = inputs if needs_k or needs_v else inputs[:1]
        inputs = inputs if needs_q else inputs[1:]
        # The graph is retained for a second backward. It keeps no tensors.
        found = torch.autograd.grad(
            outputs, inputs, [x[:, heads] for x in grads], retain_graph=True
        )
        if needs_q:
            dq.append(found[0])
        if needs_k or needs_v:
            if under_way:
                reduced.append(_reduced(under_way.pop(), call.ranks))
            under_way.append(_start_reducing(found[-2], found[-1], call.ranks))
        saved.release()

    _for_each_chunk(k, v, call, attend)
    saved.tensors = ()
    reduced += [_reduced(x, call.ranks) for x in under_way]
    dk, dv = zip(*reduced, strict=True) if reduced else ((), ())
    return (
        torch.cat(dq, 1) if needs_q else None,
        torch.cat(dk, 1) if needs_k else None,
        torch.cat(dv, 1) if needs_v else None,
    )


class _LastDerivative(torch.autograd.Function):
    """A gradient that has no derivatives in the tensors that it depends on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return no_second_derivatives(*grads)


def _last_derivative(x: Tensor, *inputs: Tensor) -> Tensor:
    result: Tensor = _LastDerivative.apply(x, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Graph(NamedTuple):
    """The edges of a chunk's graph: of the output and the log-sum-exp, and of q, k and v."""

    outputs: tuple[GradientEdge, ...]
    inputs: tuple[GradientEdge, ...]


class _Input(torch.autograd.Function):
    """The beginning of a chunk's graph. Unlike a leaf, its node does not keep the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError  # gradients are taken before this node


class _Mark(NamedTuple):
    """A view of gathered keys or values, in place of the tensor."""

    is_keys: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _SavedTensors:
    """The tensors that the graphs of all chunks save for the backward.

    Attributes:
        tensors: All tensors but views of the gathered ones. In the backward, the context of the
            function supplies them.
        keys: The gathered keys of the current chunk.
        values: The gathered values of the current chunk.
    """

    def __init__(self) -> None:
        self.tensors: Any = []
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def pack(self, x: Tensor) -> int | _Mark:
        """Returns a mark for a view of gathered keys or values; saves any other tensor."""
        for gathered in (self.keys, self.values):
            assert gathered is not None
            if x.numel() > 0 and x.untyped_storage()._cdata == gathered.untyped_storage()._cdata:
                is_keys = gathered is self.keys
                return _Mark(is_keys, tuple(x.shape), x.stride(), int(x.storage_offset()))
        self.tensors.append(x.detach())
        return len(self.tensors) - 1

    def unpack(self, packed: int | _Mark) -> Tensor:
        """Returns the saved tensor, or the view of the tensors that were gathered again."""
        if isinstance(packed, int):
            saved: Tensor = self.tensors[packed]
            return saved
        gathered = self.keys if packed.is_keys else self.values
        assert gathered is not None
        return gathered.as_strided(packed.size, packed.stride, packed.offset)

    def release(self) -> None:
        """Forgets the gathered tensors."""
        self.keys = self.values = None


def _check_captured(out: Tensor, anchor: Tensor) -> None:
    """Raises if gradients would reach a tensor other than q, k and v, which would not get them."""
    nodes, seen = [get_gradient_edge(out).node], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", anchor)
        if leaf is not anchor:
            raise NotImplementedError(
                'exchange="gather" has no gradients for a tensor that score_mod captures, got one '
                f"of shape {tuple(leaf.shape)} with requires_grad; detach it, or use "
                'exchange="heads"'
            )
        nodes += [following for following, _ in node.next_functions if following is not None]


class _Reducing(NamedTuple):
    """Gradients that are under way to the ranks of their tokens.

    Attributes:
        pending: The collective.
        heads: ``(B, heads)`` of the chunk.
        dims: The head dims of keys and values.
    """

    pending: Pending
    heads: tuple[int, int]
    dims: tuple[int, int]


def _start_reducing(dk: Tensor, dv: Tensor, ranks: Ranks) -> _Reducing:
    """Starts to send the gradients of gathered keys and values to the ranks of their tokens."""
    heads, dims = (dk.shape[0], dk.shape[1]), (dk.shape[3], dv.shape[3])
    features = heads[0] * heads[1] * sum(dims)
    lengths = ranks.lengths[: ranks.rank + 1]
    parts = [
        torch.cat(shard, dim=-1).flatten()
        for shard in zip(dk.split(lengths, dim=2), dv.split(lengths, dim=2), strict=True)
    ]
    later = ranks.size - ranks.rank - 1
    sizes = [features * n for n in lengths] + [0] * later
    received = [0] * ranks.rank + [features * ranks.length] * (later + 1)
    return _Reducing(all_to_all(torch.cat(parts), sizes, received, ranks.group), heads, dims)


def _reduced(reducing: _Reducing, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Returns the gradients of this rank's keys and values, summed in the order of ranks.

    The sum is in float32 (float64 for float64 inputs).
    """
    pending, heads, dims = reducing
    parts = pending.wait().view(ranks.size - ranks.rank, *heads, ranks.length, sum(dims))
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    dk, dv = total.to(parts.dtype).split(dims, dim=-1)
    return dk, dv
