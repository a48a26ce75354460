"""The shards of sequences in the layers of a model, and `ContextParallel`, which sets them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from flexmoba.distributed.agreement import agree_on_lengths
from flexmoba.distributed.choice import ExchangeName, NestedExchange, check_exchange_name
from flexmoba.distributed.context_parallel import context_parallel_moba
from flexmoba.distributed.ranks import Ranks, all_ranks, all_to_all, check_mesh, ranks_of
from flexmoba.distributed.traced import graph_must_be_whole

_UNSUPPORTED = ("cache", "document_ids", "key_padding_mask")


class ContextParallel(ParallelStyle):
    """A style of ``parallelize_module`` for modules whose activations are sharded by tokens.

    Each rank of the mesh calls the model with consecutive tokens of every sequence, its shard, as
    plain tensors ``(B, L_r, ...)``. The style makes every `FlexMoba` in the module attend to the
    tokens of all ranks, by `context_parallel_moba`. In `MobaAttention`, positions of the rotary
    embedding count from the first token of rank 0, the key convolution reads the last keys of the
    rank before, and ``cu_seqlens`` holds the boundaries of documents in the complete sequence.

    The parameters remain plain tensors. Every rank computes the gradients of its tokens; sum them
    over the ranks, for example by FSDP2 on a mesh that contains these ranks.

    Args:
        exchange: The exchange of `context_parallel_moba`; a pair needs a mesh of two dimensions.
        equal_lengths: Whether all ranks always have as many tokens as this one. The ranks then
            compare neither lengths nor arguments, and the host does not wait for the device.
            ``torch.compile`` with ``fullgraph=True`` needs it.

    Raises:
        TypeError: The mesh is not a ``DeviceMesh``.
        ValueError: The exchange does not exist, the mesh has the wrong number of dimensions, or the
            module contains no `FlexMoba`.

    Examples:
        One rank has the complete sequence.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from flexmoba.distributed import ContextParallel
        >>> from flexmoba.nn import MobaAttention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("context",))
        >>> layer = MobaAttention(64, 4, 2, block_size=16, topk=3, rope_base=10000.0)
        >>> spread = parallelize_module(layer, mesh["context"], ContextParallel())
        >>> spread(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        exchange: ExchangeName | NestedExchange = "auto",
        equal_lengths: bool = False,
    ) -> None:
        """Checks and stores the options."""
        super().__init__()
        check_exchange_name(exchange)
        self.exchange, self.equal_lengths = exchange, equal_lengths

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Sets the shards of every `FlexMoba`; ``parallelize_module`` calls it."""
        check_mesh(device_mesh, 2 if isinstance(self.exchange, tuple) else 1)
        # Not by type, since flexmoba.nn imports this room.
        found = [x for x in module.modules() if hasattr(x, "sequence_shards")]
        if not found:
            raise ValueError(
                f"ContextParallel found no FlexMoba in {type(module).__name__}; apply it to a "
                "module that contains a FlexMoba or MobaAttention"
            )
        shards = SequenceShards(device_mesh, self.exchange, self.equal_lengths)
        for each in found:
            each.sequence_shards = shards  # type: ignore[assignment]
        return module


class SequenceShards:
    """The shards of sequences over the ranks of a mesh.

    Args:
        mesh: The mesh of `context_parallel_moba`. Its ranks hold the tokens in their order.
        exchange: The exchange of `context_parallel_moba`.
        equal_lengths: Whether all ranks always have the same number of tokens.

    Attributes:
        mesh: The ranks as a mesh of one dimension.
    """

    def __init__(
        self, mesh: DeviceMesh, exchange: ExchangeName | NestedExchange, equal_lengths: bool
    ) -> None:
        """Stores the arguments."""
        self.mesh, self.equal_lengths = all_ranks(mesh), equal_lengths
        self.exchange, self._mesh_of_exchange = exchange, mesh

    def check(self, **options: Any) -> None:
        """Raises unless shards support the options of a call."""
        for name in _UNSUPPORTED:
            if options.get(name) is not None:
                raise NotImplementedError(
                    f"a module with ContextParallel does not support {name}; mark packed documents "
                    "by cu_seqlens, and decode with a module without it"
                )

    def ranks(self, k: Tensor) -> Ranks:
        """Returns the ranks, of which this one has the keys ``(B, Hkv, L_r, D)``."""
        if self.equal_lengths:
            lengths = (k.shape[2],) * self.mesh.size()
        else:
            lengths = _compared_lengths(k, self.mesh)
        return ranks_of(self.mesh, lengths)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int | None, **options: Any
    ) -> Any:
        """Computes `flex_moba` of the complete sequences for this rank's queries."""
        self.check(**options)
        options = {name: x for name, x in options.items() if name not in _UNSUPPORTED}
        lengths = [q.shape[2]] * self.mesh.size() if self.equal_lengths else None
        return context_parallel_moba(
            *(q, k, v, block_size, topk),
            mesh=self._mesh_of_exchange,
            exchange=self.exchange,
            lengths=lengths,
            **options,
        )

    def before(self, x: Tensor, n: int, ranks: Ranks) -> Tensor:
        """Returns the ``n`` tokens before this rank's first one, differentiable.

        Args:
            x: This rank's tokens, ``(B, H, L_r, D)``.
            n: Number of tokens.
            ranks: The ranks, from `ranks`.

        Returns:
            ``(B, H, n, D)`` in the dtype of ``x``, with zeros before the sequence.
        """
        is_traced = torch.compiler.is_compiling() and graph_must_be_whole()
        function = _before if is_traced else _before_eagerly
        found: Tensor = function(x, n, ranks)
        return found


_compared_lengths = torch.compiler.disable(
    agree_on_lengths, reason="torch.compile traces ContextParallel with equal_lengths=True"
)


def _before(x: Tensor, n: int, ranks: Ranks) -> Tensor:
    found: Tensor = _Before.apply(x, n, ranks)  # type: ignore[no-untyped-call]
    return found


_before_eagerly = torch.compiler.disable(_before)


class _Before(torch.autograd.Function):
    """The last tokens of the ranks before; the backward adds their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, ranks: Ranks) -> Tensor:
        batch, heads, length, dim = x.shape
        ctx.n, ctx.ranks, ctx.shape = n, ranks, (batch, heads, length, dim)
        counts = [_counts(rank, n, ranks) for rank in range(ranks.size)]
        size = batch * heads * dim
        sent = [count[ranks.rank] for count in counts]
        received = counts[ranks.rank]
        parts = torch.cat([x[:, :, length - count :].flatten() for count in sent])
        sizes = [size * count for count in sent], [size * count for count in received]
        found = all_to_all(parts, *sizes, ranks.group).wait()
        result = x.new_zeros((batch, heads, n, dim))
        end = n - sum(received)
        for part, count in zip(found.split(sizes[1]), received, strict=True):
            result[:, :, end : end + count] = part.view(batch, heads, count, dim)
            end += count
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        n, ranks, (batch, heads, length, dim) = ctx.n, ctx.ranks, ctx.shape
        counts = [_counts(rank, n, ranks) for rank in range(ranks.size)]
        size = batch * heads * dim
        sent, received = counts[ranks.rank], [count[ranks.rank] for count in counts]
        padding = n - sum(sent)
        parts = torch.cat([x.flatten() for x in grad.split([padding, *sent], dim=2)[1:]])
        sizes = [size * count for count in sent], [size * count for count in received]
        found = all_to_all(parts, *sizes, ranks.group).wait()
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for part, count in zip(found.split(sizes[1]), received, strict=True):
            total[:, :, length - count :] += part.view(batch, heads, count, dim)
        return total.to(grad.dtype), None, None


def _counts(rank: int, n: int, ranks: Ranks) -> list[int]:
    """Returns how many of the ``n`` tokens before a rank's first one each rank holds."""
    counts = [0] * ranks.size
    for other in reversed(range(rank)):
        counts[other] = min(n - sum(counts), ranks.lengths[other])
    return counts
