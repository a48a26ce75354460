"""The exchange by gathering: each rank gets the keys and values that its queries may attend to.

They are those of the ranks before, up to the beginning of the sequence or of the document that
spans the ranks. A rank attends to one chunk of KV heads at a time. Meanwhile, the keys and values
of the next chunk are under way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from flexmoba.distributed.attend import Attention
from flexmoba.distributed.plan import Plan
from flexmoba.distributed.ranks import Pending, Ranks, all_to_all
from flexmoba.distributed.saved import Input, SavedTensors
from flexmoba.runtime import no_second_derivatives

# Bytes of the gathered keys and values of a chunk of KV heads. A chunk has at least one KV head.
BYTES_AT_ONCE = 2**28


def attend_by_gathering(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Attention,
    plan: Plan,
    *,
    with_lse: bool,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of this rank's queries; see `context_parallel_moba`.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention.
        plan: The keys that each rank needs.
        with_lse: Whether to return the log-sum-exp.
        max_seqlen: A bound of the lengths of documents, or None.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)`` or None.
    """
    chunks = chunks_of(k, v, plan.ranks)
    call = _Call(attention, plan, chunks, q.shape[1] // k.shape[1], with_lse, max_seqlen)
    if plan.sends_nothing:  # then there is one part
        out, lse = call.attend(0, q, k, v, first_head=0)
        return out, lse if with_lse else None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        results = _GatheredAttention.apply(q, k, v, call)  # type: ignore[no-untyped-call]
    else:
        results = _attend(q, k, v, call)
    return results if with_lse else (results[0], None)


class _Call(NamedTuple):
    """The arguments of a call that are not tensors of tokens.

    Attributes:
        attention: The attention.
        plan: The keys that each rank needs.
        chunks: The first KV head of each chunk, and the KV head after its last one.
        group: Number of query heads of a KV head.
        with_lse: Whether the log-sum-exp is a result.
        max_seqlen: A bound of the lengths of documents, or None.
    """

    attention: Attention
    plan: Plan
    chunks: list[tuple[int, int]]
    group: int
    with_lse: bool
    max_seqlen: int | None

    def of_queries(self, chunk: int) -> slice:
        """Returns the query heads of a chunk."""
        first, end = self.chunks[chunk]
        return slice(first * self.group, end * self.group)

    def attend(
        self, part: int, q: Tensor, k: Tensor, v: Tensor, *, first_head: int
    ) -> tuple[Tensor, Tensor]:
        """Attends from the queries of a part."""
        _, first_key, cu_seqlens = self.plan.parts[part]
        documents: dict[str, Any] = {}
        if cu_seqlens is not None:
            documents = {"cu_seqlens": cu_seqlens, "max_seqlen": self.max_seqlen}
        return self.attention(q, k, v, first_head=first_head, first_key=first_key, **documents)


def chunks_of(k: Tensor, v: Tensor, ranks: Ranks) -> list[tuple[int, int]]:
    """Divides the KV heads, in the same way on all ranks."""
    batch, heads, _, dim = k.shape
    features = batch * (dim + v.shape[-1])
    per_head = max(1, ranks.total * features * k.element_size())
    at_once = max(1, BYTES_AT_ONCE // per_head)
    return [(first, min(first + at_once, heads)) for first in range(0, heads, at_once)]


# ---- The exchange -------------------------------------------------------------------------------


def _for_each_chunk(
    k: Tensor, v: Tensor, call: _Call, function: Callable[[int, list[Tensor]], None]
) -> None:
    """Calls ``function(chunk, gathered)`` while the next chunk is under way.

    The gathered tensors are keys and values of each part. They exist until the call returns, so
    that at most two chunks exist.
    """
    own = [(k[:, first:end], v[:, first:end]) for first, end in call.chunks]
    following: Pending | None = start_gathering(*own[0], call.plan)
    for chunk in range(len(call.chunks)):
        assert following is not None
        gathered = arranged(following.wait(), *own[chunk], call.plan)
        following = None  # frees the received tensor before the next one is allocated
        if chunk + 1 < len(call.chunks):
            following = start_gathering(*own[chunk + 1], call.plan)
        function(chunk, gathered)
        del gathered


def start_gathering(k: Tensor, v: Tensor, plan: Plan) -> Pending:
    """Starts to send the last keys and values of this rank, side by side, to the ranks after it.

    ``k (B, heads, L, D)`` and ``v (B, heads, L, Dv)`` are those of a chunk.
    """
    sent, received = plan.sent(), plan.received(plan.ranks.rank)
    parts = [
        torch.cat([x[:, :, x.shape[2] - count :] for x in (k, v)], dim=-1).flatten()
        for count in sent
    ]
    features = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    sizes = [features * count for count in sent], [features * count for count in received]
    return all_to_all(torch.cat(parts), *sizes, plan.ranks.group)


def arranged(received: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[Tensor]:
    """Returns contiguous keys and values of each part, given those of this rank."""
    batch, heads, _, dim = k.shape
    counts = plan.received(plan.ranks.rank)
    features = batch * heads * (dim + v.shape[3])
    shards = [
        x.view(batch, heads, count, -1)
        for x, count in zip(received.split([features * n for n in counts]), counts, strict=True)
        if count > 0
    ]
    gathered = []
    for queries, first_key, _ in plan.parts:
        is_later = first_key > plan.first_keys[plan.ranks.rank]
        before = [] if is_later else shards
        gathered += [
            torch.cat([*(x[..., part] for x in before), mine[:, :, queries]], dim=2)
            for part, mine in zip((slice(dim), slice(dim, None)), (k, v), strict=True)
        ]
    return gathered


# ---- Forward ------------------------------------------------------------------------------------


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp of all chunks, to be written."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, ...]:
    """Computes the results without a graph."""
    out, lse = _empty_results(q, v)

    def attend(chunk: int, gathered: list[Tensor]) -> None:
        heads = call.of_queries(chunk)
        for part, (queries, _, _) in enumerate(call.plan.parts):
            tensors = q[:, heads, queries], *gathered[2 * part : 2 * part + 2]
            result = call.attend(part, *tensors, first_head=heads.start)
            out[:, heads, queries], lse[:, heads, queries] = result

    _for_each_chunk(k, v, call, attend)
    return (out, lse) if call.with_lse else (out,)


class _Graph(NamedTuple):
    """The edges of a graph: of the output and the log-sum-exp, and of q, k and v."""

    outputs: tuple[GradientEdge, ...]
    inputs: tuple[GradientEdge, ...]


class _GatheredAttention(torch.autograd.Function):
    """The attention of all chunks; the backward gathers the keys and values again.

    Each part of a chunk has a graph of its own, made in the forward and run in the backward. The
    graphs keep no tensors: gathered tensors and the output are replaced by marks, and all others
    are saved in the context of this function, so that hooks such as those of activation
    checkpointing apply to them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Any:
        saved = SavedTensors()
        graphs: list[_Graph] = []
        out, lse = _empty_results(q, v)

        def attend(chunk: int, gathered: list[Tensor]) -> None:
            heads = call.of_queries(chunk)
            saved.hold(gathered)
            for part, (queries, _, _) in enumerate(call.plan.parts):
                with torch.enable_grad(), saved_tensors_hooks(saved.pack, saved.unpack):
                    anchor = torch.empty(0, device=q.device, requires_grad=True)
                    tensors = q.detach()[:, heads, queries], *gathered[2 * part : 2 * part + 2]
                    inputs = [Input.apply(x, anchor) for x in tensors]  # type: ignore[no-untyped-call]
                    result = call.attend(part, *inputs, first_head=heads.start)
                if call.attention.score_mod is not None:
                    _check_captured(result[0], anchor)
                graphs.append(
                    _Graph(
                        tuple(map(get_gradient_edge, result[: 1 + call.with_lse])),
                        tuple(map(get_gradient_edge, inputs)),
                    )
                )
                out[:, heads, queries], lse[:, heads, queries] = (x.detach() for x in result)
                saved.keep_output_once(result[0], heads, queries)
            saved.release()

        _for_each_chunk(k, v, call, attend)
        ctx.save_for_backward(q, k, v, out, *saved.tensors)
        saved.tensors = ()
        ctx.call, ctx.saved, ctx.graphs = call, saved, graphs
        return (out, lse) if call.with_lse else (out,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = ctx.saved_tensors
        with torch.no_grad():
            results = _gradients(ctx, tensors, grads)
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (*tensors[:3], *grads)
            results = tuple(x if x is None else _last_derivative(x, *inputs) for x in results)
        return *results, None


# ---- Backward -----------------------------------------------------------------------------------


def _gradients(
    ctx: Any, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of q, k and v, or None for those that need none."""
    call, saved = ctx.call, ctx.saved
    # As the graph around this call: a compiled function may overwrite tensors that it saved, and
    # raises if its graph is retained.
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    q, k, v, saved.output, *saved.tensors = tensors
    needs_q, needs_k, needs_v, _ = ctx.needs_input_grad
    dq = torch.empty_like(q) if needs_q else None
    dk = torch.empty_like(k) if needs_k else None
    dv = torch.empty_like(v) if needs_v else None
    under_way: list[tuple[int, Reducing]] = []

    def finish() -> None:
        chunk, reducing = under_way.pop(0)
        first, end = call.chunks[chunk]
        both = reduced(reducing, call.plan).split((k.shape[3], v.shape[3]), dim=-1)
        for x, grad in zip((dk, dv), both, strict=True):
            if x is not None:
                x[:, first:end] = grad

    def attend(chunk: int, gathered: list[Tensor]) -> None:
        heads = call.of_queries(chunk)
        saved.hold(gathered)
        of_keys = []
        for part, (queries, _, _) in enumerate(call.plan.parts):
            outputs, inputs = ctx.graphs[chunk * len(call.plan.parts) + part]
            inputs = inputs if needs_k or needs_v else inputs[:1]
            inputs = inputs if needs_q else inputs[1:]
            found = torch.autograd.grad(
                outputs, inputs, [x[:, heads, queries] for x in grads], retain_graph=retained
            )
            if dq is not None:
                dq[:, heads, queries] = found[0]
            if needs_k or needs_v:
                of_keys.append(torch.cat(found[-2:], dim=-1))
        saved.release()
        if of_keys:
            if under_way:
                finish()
            grad = torch.cat(of_keys, dim=2)
            under_way.append((chunk, start_reducing(grad, call.plan)))

    _for_each_chunk(k, v, call, attend)
    saved.tensors, saved.output = (), None
    while under_way:
        finish()
    return dq, dk, dv


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


class Reducing(NamedTuple):
    """Gradients of a chunk that are under way to the ranks of their tokens.

    Attributes:
        pending: The collective.
        own: The gradients of this rank's keys and values from its own queries, side by side,
            ``(B, heads, L, D + Dv)``.
    """

    pending: Pending
    own: Tensor


def start_reducing(grad: Tensor, plan: Plan) -> Reducing:
    """Starts to send gradients of gathered keys and values to the ranks of their tokens.

    ``grad (B, heads, keys, D + Dv)`` holds those of keys and values side by side.
    """
    received, sent = plan.received(plan.ranks.rank), plan.sent()
    *shards, own = grad.split([*received, plan.ranks.length], dim=2)
    features = grad.shape[0] * grad.shape[1] * grad.shape[3]
    parts = torch.cat([x.flatten() for x in (*shards, own[:, :, :0])])
    sizes = [features * count for count in received], [features * count for count in sent]
    return Reducing(all_to_all(parts, *sizes, plan.ranks.group), own)


def reduced(reducing: Reducing, plan: Plan) -> Tensor:
    """Returns the gradients of this rank's keys and values, ``(B, heads, L, D + Dv)``.

    It adds them in the order of ranks, in float32 (float64 for float64 inputs).
    """
    pending, own = reducing
    total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
    counts, features = plan.sent(), own.shape[0] * own.shape[1] * own.shape[3]
    received = pending.wait().split([features * count for count in counts])
    for part, count in zip(received, counts, strict=True):
        total[:, :, total.shape[2] - count :] += part.view(*own.shape[:2], count, own.shape[3])
    return total
