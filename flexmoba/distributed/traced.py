"""The exchange by gathering in a graph of ``torch.compile``, from operators that it can trace.

The arithmetic is that of `gather.py`, so results are equal bit for bit. The graph keeps the
gathered keys and values of all chunks until the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from flexmoba.distributed.attend import Attention
from flexmoba.distributed.gather import (
    arranged,
    chunks_of,
    reduced,
    start_gathering,
    start_reducing,
)
from flexmoba.distributed.plan import Plan


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def graph_must_be_whole() -> bool:
    """Returns whether dynamo must not break the graph, as with ``fullgraph=True``."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):  # without a tracer, or in another version of torch
        return True


def attend_in_a_graph(
    q: Tensor, k: Tensor, v: Tensor, attention: Attention, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Computes the attention of this rank's queries to one sequence.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention.
        plan: The keys that each rank needs. Each rank has one part.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)``.
    """
    sizes, group = (
        [end - first for first, end in chunks_of(k, v, plan.ranks)],
        q.shape[1] // k.shape[1],
    )
    heads = [n * group for n in sizes]
    chunks = list(zip(q.split(heads, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True))
    results, first_head = [], 0
    following = start_gathering(chunks[0][1].detach(), chunks[0][2].detach(), plan)
    for i, (queries, keys, values) in enumerate(chunks):
        received = following.wait()
        if i + 1 < len(chunks):
            following = start_gathering(chunks[i + 1][1].detach(), chunks[i + 1][2].detach(), plan)
        gathered = _Gathered.apply(keys, values, received, plan)  # type: ignore[no-untyped-call]
        results.append(attention(queries, *gathered, first_head=first_head))
        first_head += heads[i]
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    return out, lse


class _Gathered(torch.autograd.Function):
    """Keys and values of a chunk, of which other ranks sent some.

    The backward sends gradients to the ranks of the tokens.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, received: Tensor, plan: Plan) -> Any:
        ctx.plan = plan
        return tuple(arranged(received, k, v, plan))

    @staticmethod
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> Any:
        grads = reduced(start_reducing(d_k, d_v, ctx.plan), ctx.plan)
        return *(x.to(d_k.dtype) for x in grads), None, None
