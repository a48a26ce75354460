"""`flex_nsa`: validates, selects, attends in each branch, and merges them by gate values."""

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import ImplName, resolve, run_compiled
from flexmoba.checks import (
    check_documents,
    check_no_tangents,
    check_options,
    check_queries_and_keys,
    check_values,
)
from flexmoba.local import with_aux
from flexmoba.nsa.branches import (
    block_means_of,
    compressed_branch,
    selected_branch,
)
from flexmoba.nsa.checks import (
    check_branches,
    check_gates,
    check_shared_selection,
    check_sizes,
    check_window,
)
from flexmoba.nsa.layout import nsa_layout
from flexmoba.nsa.select import select_in_slots
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors
from flexmoba.window import attend_to_window


@overload
def flex_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    window: int = 512,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: None = None,
    selection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor: ...


@overload
def flex_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    window: int = 512,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: AuxRequest,
    selection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def flex_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    window: int = 512,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: AuxRequest | None = None,
    selection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Computes Native Sparse Attention: compressed, selected and window attention with gates.

    Implements Eq. 5 to 12 of arXiv 2502.11089, Sec. 3.2 and 3.3. Three branches attend by separate
    softmaxes. The output is the sum of their outputs, each multiplied by its gate value (Eq. 5):

    ``out = gates[..., 0] * compressed + gates[..., 1] * selected + gates[..., 2] * window``

    The compressed branch attends to one key for each compressed block that ends at or before the
    query (Eq. 7). The selected branch attends to the keys, at or before the query, of the blocks
    that `nsa_select` selects (Eq. 8 to 12). The window branch attends to the last ``window``
    tokens, including the query's own. A query that sees no compressed block gets zeros from that
    branch, a log-sum-exp of -inf and zero gradients. With ``window=0``, there is no window branch:
    its log-sum-exp is -inf, and its gate value has no effect.

    The output and the log-sum-exps are differentiable by reverse mode in all tensors but the
    selection. The compressed branch alone trains the scores that select blocks. Forward
    and backward are deterministic, and no tensor in memory has the size ``Lq * Lk``. On CUDA, the
    compressed and the window branch call FlexAttention, and the selection and, for 8 to 128 query
    heads of each KV head, the selected branch have their own kernels.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` has the
            position ``i + Lk - Lq``.
        k: Keys of the selected branch, ``(B, Hkv, Lk, D)``, in the dtype of q. ``Hkv`` divides
            ``Hq``, and ``Lk >= Lq``.
        v: Values of the selected branch, ``(B, Hkv, Lk, Dv)``, in the dtype of q.
        gates: Gate values of the compressed, the selected and the window branch, in this order,
            ``(B, Hq or 1, Lq, 3)``, in the dtype of q. They are values, not logits: the paper
            applies a sigmoid before.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``, in the dtype of q. Compressed block ``i``
            holds the tokens from ``i * cmp_stride`` to ``i * cmp_stride + cmp_block - 1``. Only
            full blocks exist: ``blocks = (Lk - cmp_block) // cmp_stride + 1``, or 0 below
            ``cmp_block`` tokens. By default, the means of the keys of each compressed block.
        v_cmp: Compressed values, ``(B, Hkv, blocks, Dv)``; by default the means of the values.
        k_win: Keys of the window branch, ``(B, Hkv, Lk, D)``, by default k. With ``window=0``,
            pass neither keys nor values of this branch.
        v_win: Values of the window branch, ``(B, Hkv, Lk, Dv)``, by default v.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks. It divides
            ``cmp_block`` and ``block_size``.
        block_size: Keys in a block of the selected branch. The last block may be shorter.
        topk: Number of blocks that each query selects, at least ``1 + sink_blocks +
            local_blocks``. It includes the own block, which contains the query's position.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
        window: Tokens in the window of a query, including its own; 0 for no window branch.
        scale: Factor on the scores of all branches, ``1 / sqrt(D)`` by default.
        impl: The backend of all branches, as in `flex_moba`.
        return_aux: ``AuxRequest(lse=True)`` also returns the log-sum-exps of the branches.
        selection: Block indices, ``(B, Hkv, Lq, topk)``, int32 or int64, -1 for none, instead of
            those of `nsa_select`. ``topk``, ``sink_blocks`` and ``local_blocks`` then have no
            effect.
        cu_seqlens: Boundaries of packed documents, as in `flex_moba`. Each document is computed as
            if it were alone: its blocks, compressed blocks and windows begin with it. ``k_cmp`` and
            ``v_cmp`` list the compressed blocks of all documents of the row, in order; compressed
            keys and values after them have no effect. Block indices count the blocks of all
            documents of the row, as in `nsa_select`. Time and memory are those of documents padded
            to full blocks.
        document_ids: As in `flex_moba`.
        key_padding_mask: As in `flex_moba`. The real tokens of a row form its sequence. Padding
            gets zeros, log-sum-exps of -inf and zero gradients, and its values have no effect.

    Returns:
        The output, ``(B, Hq, Lq, Dv)``, in the dtype of q. With ``return_aux``, a pair of the
        output and an ``AuxOutput``. Its ``lse``, if requested, holds the log-sum-exps of the
        branches in the order of the gates, ``(B, Hq, Lq, 3)``, float32 (float64 for float64
        inputs).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range.
        NotImplementedError: The backend that ``impl`` names does not support the inputs, or the
            inputs have forward-mode derivatives. The message names the remedy.

    Examples:
        >>> import torch
        >>> from flexmoba.nsa import flex_nsa
        >>> q = torch.randn(1, 4, 300, 16, requires_grad=True)
        >>> k, v = torch.randn(2, 1, 2, 300, 16)
        >>> gates = torch.randn(1, 4, 300, 3).sigmoid()
        >>> out = flex_nsa(q, k, v, gates, topk=4, window=100)
        >>> out.shape
        torch.Size([1, 4, 300, 16])
        >>> out.sum().backward()
    """
    sizes = NsaSizes(cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks)
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_sizes(sizes)
    check_window(window, k_win, v_win)
    check_gates(q, gates)
    check_branches(q, k, v, (k_cmp, v_cmp), (k_win, v_win), sizes)
    if selection is not None:
        check_shared_selection(selection, q, k.shape[1])
    check_options(scale, None, None, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    resolve(impl, q, k, v)  # raises, also if there are no queries
    given = {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_win": k_win, "v_win": v_win}
    tensors = {"q": q, "k": k, "v": v, "gates": gates}
    tensors |= {name: x for name, x in given.items() if x is not None}
    check_no_tangents(**tensors)
    if q.numel() == 0:
        nothing = 0 * sum(x.sum() for x in tensors.values())
        lse = q.new_zeros((*q.shape[:3], 3), dtype=torch.promote_types(q.dtype, torch.float32))
        return with_aux(
            q.new_zeros((*q.shape[:3], v.shape[-1])) + nothing, lse + nothing, return_aux
        )

    # Lay out the documents, compress, attend, and put back.
    layout = nsa_layout(k.shape[2], sizes, cu_seqlens, document_ids, key_padding_mask)
    first_block = layout.tokens.first_block
    q, k, v, gates = (layout.tokens.spread(x) for x in (q, k, v, gates))
    if k_cmp is None or v_cmp is None:
        k_cmp, v_cmp = (layout.without_unused(block_means_of(x, sizes)) for x in (k, v))
    else:
        k_cmp, v_cmp = layout.spread_compressed(k_cmp), layout.spread_compressed(v_cmp)
    if k_win is None or v_win is None:
        k_win, v_win = k, v
    else:
        k_win, v_win = layout.tokens.spread(k_win), layout.tokens.spread(v_win)
    tensors_of_branches = BranchTensors(k, v, k_cmp, v_cmp, k_win, v_win)
    call = NsaCall(sizes, window, scale, impl)
    if selection is not None:
        selection = layout.tokens.spread_selection(selection)
    out, lse = attend_in_branches(q, gates, tensors_of_branches, call, first_block, selection)
    return with_aux(*layout.collect_results(out, lse), return_aux)


class NsaCall(NamedTuple):
    """Options of a call.

    Attributes:
        sizes: Sizes of the blocks and of the selection.
        window: Tokens in a window, 0 for no window branch.
        scale: Factor on the scores, ``1 / sqrt(D)`` if None.
        impl: The backend of all branches.
    """

    sizes: NsaSizes
    window: int
    scale: float | None
    impl: ImplName


def attend_in_branches(
    q: Tensor,
    gates: Tensor,
    tensors: BranchTensors,
    call: NsaCall,
    first_block: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects, attends in each branch, and merges.

    Args:
        q: Queries in slots, ``(B, Hq, Lq, D)``.
        gates: Gate values, ``(B, Hq or 1, Lq, 3)``.
        tensors: Keys and values in slots. Those of the window branch may begin with the first token
            of the first window. Without a window branch, they have no effect.
        call: Options.
        first_block: ``(B, Lq)`` int32, the first block of each query's document, or None.
        selection: Block indices in slots, ``(B, Hkv, Lq, topk)``, or None for the most important
            blocks.

    Returns:
        The output ``(B, Hq, Lq, Dv)``, and the log-sum-exps of the branches, ``(B, Hq, Lq, 3)``.
    """
    k, v, k_cmp, v_cmp, k_win, v_win = tensors
    sizes, window, scale, impl = call
    kv_len = k.shape[2]
    first_token = None if first_block is None else first_block * sizes.block_size
    windowed: tuple[Tensor, ...] = ()
    has_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *tensors))
    if window > 0 and not has_gradients:
        # On CUDA, the window is computed while the host launches the kernels of the compressed
        # branch's mask, which are many and short.
        windowed = attend_to_window(q, k_win, v_win, window, first_token, scale, impl)
    compressed = compressed_branch(q, k_cmp, v_cmp, kv_len, first_block, sizes, scale, impl)
    if selection is None:
        selection = select_in_slots(q, k_cmp, kv_len, first_block, sizes, scale, compressed[1])
    selected = selected_branch(q, k, v, selection, sizes.block_size, scale, impl)
    if window > 0 and has_gradients:
        # With gradients, the window comes last: autograd then differentiates it first, and frees
        # its tensors before the selected branch, whose backward pass needs the most memory.
        windowed = attend_to_window(q, k_win, v_win, window, first_token, scale, impl)
    inputs = gates, *compressed, *selected, *windowed
    if q.is_cuda:  # compiled, the merge is one pass over memory, and so is its gradient
        return run_compiled(_merge, *inputs, kernel_options=None)
    return _merge(*inputs)


def _merge(
    gates: Tensor, *results: Tensor, kernel_options: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the sum of outputs times gate values, rounded once, and all log-sum-exps.

    ``results`` are the output and the log-sum-exp of each branch, in the order of the gates.
    """
    outs, lses = results[::2], results[1::2]
    precise = torch.promote_types(gates.dtype, torch.float32)
    weighted = [
        out.to(precise) * gate.to(precise)[..., None]
        for out, gate in zip(outs, gates.unbind(-1), strict=False)
    ]
    out = functools.reduce(operator.add, weighted).to(gates.dtype)
    lse = torch.stack(lses, dim=-1)
    missing = gates.shape[-1] - len(lses)
    return out, lse if missing == 0 else F.pad(lse, (0, missing), value=-math.inf)
