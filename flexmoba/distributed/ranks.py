"""The ranks of a mesh, the lengths of their shards, and collectives that run in the background."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 renames the function and deprecates the old name.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks(NamedTuple):
    """The ranks that share a sequence, in the order of their shards.

    Attributes:
        group: The process group.
        rank: The index of this rank in the group.
        lengths: Number of tokens of each rank.
    """

    group: dist.ProcessGroup
    rank: int
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Number of tokens of all ranks."""
        return sum(self.lengths)

    @property
    def first(self) -> int:
        """The position of this rank's first token."""
        return self.firsts[self.rank]

    @property
    def firsts(self) -> tuple[int, ...]:
        """The position of each rank's first token."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def length(self) -> int:
        """Number of tokens of this rank."""
        return self.lengths[self.rank]


def all_ranks(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the ranks of a mesh as a mesh of one dimension."""
    return mesh if mesh.ndim == 1 else mesh._flatten()


def ranks_of(mesh: DeviceMesh, lengths: Sequence[int]) -> Ranks:
    """Returns the ranks of a mesh, which have ``lengths`` tokens."""
    # The range makes dynamo compile each length apart. In a graph, autograd functions cannot take
    # symbolic lengths.
    constants = tuple(len(range(n)) for n in lengths)
    return Ranks(mesh.get_group(), mesh.get_local_rank(), constants)


class Pending(NamedTuple):
    """A collective that runs in the background. It keeps its tensors alive.

    Attributes:
        work: The handle of torch; None in a graph of torch.compile.
        received: The tensor that the collective fills.
        sent: The tensor that the collective reads.
    """

    work: Any
    received: Tensor
    sent: Tensor

    def wait(self) -> Tensor:
        """Returns the received tensor; on CUDA, the stream waits for it and the host does not."""
        if self.work is None:
            received: Tensor = torch.ops._c10d_functional.wait_tensor(self.received)
            return received
        self.work.wait()
        return self.received


def check_mesh(mesh: DeviceMesh, ndim: int = 1) -> None:
    """Raises unless ``mesh`` is a mesh of one dimension, or of two."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}; "
            "make one with init_device_mesh"
        )
    if ndim == 2 and (mesh.ndim != 2 or mesh.mesh_dim_names is None):
        raise ValueError(
            f"mesh must have two dimensions with names for a pair of exchanges, nodes and the "
            f"ranks of a node, got {mesh.ndim} ({mesh.mesh_dim_names}); pass such as "
            "mesh['node', 'gpu']"
        )
    if mesh.ndim > ndim:
        raise ValueError(
            f"mesh must have one dimension, the ranks that share a sequence, got {mesh.ndim} "
            f"({mesh.mesh_dim_names}); pass one of them, such as mesh['context']"
        )


def check_lengths(lengths: Sequence[int], length: int, mesh: DeviceMesh) -> None:
    """Raises unless the caller's lengths have one for each rank, and this rank's is right."""
    if len(lengths) != mesh.size():
        raise ValueError(
            f"lengths must have one length for each rank, got {len(lengths)} for {mesh.size()} "
            "ranks; pass the same lengths on all ranks"
        )
    rank = mesh.get_local_rank()
    if lengths[rank] != length:
        raise ValueError(
            f"lengths[{rank}] must be the number of tokens of rank {rank}, got {lengths[rank]} and "
            f"{length} tokens; pass the same lengths on all ranks"
        )


def all_gather(x: Tensor, group: dist.ProcessGroup, count: int) -> Pending:
    """Starts to gather ``x``, contiguous and of the same shape on each rank.

    The received tensor is ``(count, *x.shape)``.
    """
    received = x.new_empty((count, *x.shape))
    work = _ALL_GATHER(received.view(-1), x.view(-1), group=group, async_op=True)
    return Pending(work, received, x)


def all_to_all(
    x: Tensor, sizes: Sequence[int], received_sizes: Sequence[int], group: dist.ProcessGroup
) -> Pending:
    """Starts to send parts of ``x`` to the ranks, and to receive parts from them.

    Args:
        x: ``(sum(sizes),)``, the parts for each rank, in the order of ranks.
        sizes: Number of elements for each rank.
        received_sizes: Number of elements from each rank.
        group: The process group.

    Returns:
        The collective. The received tensor is ``(sum(received_sizes),)``.
    """
    if torch.compiler.is_compiling():
        received = torch.ops._c10d_functional.all_to_all_single(
            x, list(received_sizes), list(sizes), group.group_name
        )
        return Pending(None, received, x)
    received = x.new_empty(sum(received_sizes))
    work = dist.all_to_all_single(
        received, x, list(received_sizes), list(sizes), group=group, async_op=True
    )
    return Pending(work, received, x)
