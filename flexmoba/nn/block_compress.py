"""`BlockCompress`: one key or value for every compressed block of Native Sparse Attention."""

from typing import Any

import torch
from torch import Tensor, nn

from flexmoba.checks import check_documents, check_positive, check_tensor
from flexmoba.nsa import NsaSizes, block_means_of, check_sizes, nsa_layout


class BlockCompress(nn.Module):
    """Module that maps the keys or values of every compressed block to one key or value.

    This is the function phi of arXiv 2502.11089, Sec. 3.3.1, Eq. 7: a multilayer perceptron of the
    tokens of the block, with a learned embedding of their positions in the block. The paper leaves
    its depth open. This module adds a perceptron of two layers to the mean of the block. The second
    layer begins with zeros, so that training begins with means. All heads share the parameters.

    Args:
        head_dim: Head dim ``D`` of the keys or values, and width of the hidden layer.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks, a divisor of
            ``cmp_block``.
        mlp: Whether to add the perceptron to the mean. If False, the module has no parameters.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is not positive, or ``cmp_stride`` does not divide ``cmp_block``.

    Examples:
        >>> import torch
        >>> from flexmoba.nn import BlockCompress
        >>> compress = BlockCompress(16, cmp_block=32, cmp_stride=16)
        >>> compress(torch.randn(1, 2, 100, 16)).shape  # 5 = (100 - 32) // 16 + 1
        torch.Size([1, 2, 5, 16])
    """

    def __init__(
        self,
        head_dim: int,
        cmp_block: int = 32,
        cmp_stride: int = 16,
        *,
        mlp: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the perceptron."""
        super().__init__()
        check_positive("head_dim", head_dim, "pass a number of features or heads")
        # Of the blocks of attention, only their alignment to `cmp_stride` matters here.
        self.sizes = NsaSizes(cmp_block, cmp_stride, cmp_stride, 1, 0, 0)
        check_sizes(self.sizes)
        self.positions: Tensor | None = None
        self.mlp: nn.Sequential | None = None
        if mlp:
            factory: dict[str, Any] = {"device": device, "dtype": dtype}
            self.positions = nn.Parameter(torch.empty(cmp_block, head_dim, **factory))
            nn.init.normal_(self.positions, std=0.02)
            self.mlp = nn.Sequential(
                nn.Linear(cmp_block * head_dim, head_dim, **factory),
                nn.GELU(),
                nn.Linear(head_dim, head_dim, **factory),
            )
            for parameter in self.mlp[2].parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the compressed keys or values.

        Args:
            x: Keys or values, ``(B, H, L, D)``, in the dtype of the parameters.
            cu_seqlens: Boundaries of packed documents, as in `flex_nsa`.
            document_ids: Document of each token, as in `flex_nsa`.
            key_padding_mask: True for real tokens, as in `flex_nsa`.

        Returns:
            ``(B, H, blocks, D)`` with ``blocks = (L - cmp_block) // cmp_stride + 1``, or 0 for
            fewer than ``cmp_block`` tokens. With documents, these are the compressed blocks of all
            documents of a row, in order, and zeros after them.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Shapes, dtypes or devices do not match.
        """
        check_tensor("x", x)
        check_documents(x, x, cu_seqlens, document_ids, key_padding_mask)
        if x.numel() == 0:
            return x[:, :, :0]
        layout = nsa_layout(x.shape[2], self.sizes, cu_seqlens, document_ids, key_padding_mask)
        return layout.collect_compressed(self.compress(layout.tokens.spread(x)))

    def compress(self, x: Tensor) -> Tensor:
        """Returns the keys or values of all compressed blocks of ``x (B, H, L, D)``, one sequence.

        Args:
            x: Keys or values, ``(B, H, L, D)``.
        """
        means = block_means_of(x, self.sizes)
        if self.mlp is None or means.shape[2] == 0:
            return means
        assert self.positions is not None
        blocks = x.unfold(2, self.sizes.cmp_block, self.sizes.cmp_stride).mT
        added: Tensor = self.mlp((blocks + self.positions).flatten(-2))
        return means + added

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        return f"cmp_block={self.sizes.cmp_block}, cmp_stride={self.sizes.cmp_stride}"
