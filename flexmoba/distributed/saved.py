"""The tensors that a gathered call saves: no gathered keys, and the output once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Gathered(NamedTuple):
    """A view of gathered keys or values, in place of the tensor."""

    tensor: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Output(NamedTuple):
    """A part of the output of the call, in place of the tensor."""

    heads: slice
    queries: slice


class SavedTensors:
    """The tensors that the graphs of all chunks save for the backward.

    Attributes:
        tensors: All tensors but views of the gathered ones and parts of the output. In the
            backward, the context of the function supplies them.
        output: The output of the call; in the backward, from the context, too.
        gathered: The gathered keys and values of the current chunk.
    """

    def __init__(self) -> None:
        """Makes an empty collection."""
        self.tensors: Any = []
        self.output: Tensor | None = None
        self.gathered: list[Tensor] = []
        self._first = 0  # the first tensor of the current chunk
        self._marks: dict[int, _Output] = {}

    def hold(self, gathered: list[Tensor]) -> None:
        """Begins a chunk of these gathered keys and values."""
        self.gathered, self._first = gathered, len(self.tensors)

    def pack(self, x: Tensor) -> int | _Gathered:
        """Returns a mark for a view of gathered tensors; saves any other tensor."""
        for index, gathered in enumerate(self.gathered):
            if x.numel() > 0 and _share_storage(x, gathered):
                return _Gathered(index, tuple(x.shape), x.stride(), int(x.storage_offset()))
        self.tensors.append(x.detach())
        return len(self.tensors) - 1

    def unpack(self, packed: int | _Gathered) -> Tensor:
        """Returns the saved tensor, or a view of tensors that were gathered again."""
        if isinstance(packed, _Gathered):
            return self.gathered[packed.tensor].as_strided(
                packed.size, packed.stride, packed.offset
            )
        if packed in self._marks:
            assert self.output is not None
            heads, queries = self._marks[packed]
            return self.output[:, heads, queries].contiguous()
        saved: Tensor = self.tensors[packed]
        return saved

    def keep_output_once(self, result: Tensor, heads: slice, queries: slice) -> None:
        """Forgets a saved result whose copy is a part of the output.

        Args:
            result: ``(B, heads, queries, Dv)``, which the current chunk may have saved.
            heads: Its heads in the output.
            queries: Its queries in the output.
        """
        if result.numel() == 0 or not result.is_contiguous():
            return
        for index in range(self._first, len(self.tensors)):
            x = self.tensors[index]
            if x is not None and x.shape == result.shape and _share_storage(x, result):
                self._marks[index] = _Output(heads, queries)
                self.tensors[index] = None

    def release(self) -> None:
        """Forgets the gathered tensors."""
        self.gathered = []


def _share_storage(x: Tensor, y: Tensor) -> bool:
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


class Input(torch.autograd.Function):
    """The beginning of a chunk's graph. Unlike a leaf, its node does not keep the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        """Returns ``x``, which requires gradients because ``anchor`` does."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Never runs: gradients are taken before this node."""
        raise AssertionError
