"""Modules: Mixture of Block Attention as a part of a model."""

from typing import Any, Literal

from torch import Tensor, nn

from flexmoba.attention import flex_moba
from flexmoba.checks import check_block_size, check_topk


class FlexMoba(nn.Module):
    """`flex_moba` as a module: how many blocks of what size, and no parameters.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2. Its options may change at any time, between
    two steps of training, say: the paper's Sec. 2.3 switches between MoBA and full attention. A
    compiled model compiles anew for each combination of options that it meets.

    Args:
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own included; None for full attention.
        eval_topk: The same outside training (``module.eval()``); ``"same"`` for no other.
        options: Keyword arguments for every call of `flex_moba`, such as ``gate="tile"`` or
            ``sink_blocks=1``.

    Raises:
        TypeError: ``block_size`` or a ``topk`` is no integer.
        ValueError: One of them is not positive.

    Examples:
        >>> import torch
        >>> from flexmoba.nn import FlexMoba
        >>> attend = FlexMoba(block_size=64, topk=3, eval_topk=None)
        >>> q, k, v = torch.randn(3, 1, 2, 300, 16)
        >>> attend(q, k, v).shape
        torch.Size([1, 2, 300, 16])
        >>> attend.eval()
        FlexMoba(block_size=64, topk=3, eval_topk=None)
    """

    def __init__(
        self,
        block_size: int,
        topk: int | None,
        *,
        eval_topk: int | Literal["same"] | None = "same",
        **options: Any,
    ) -> None:
        """Checks and keeps the options."""
        super().__init__()
        check_block_size(block_size)
        for k in (topk, None if eval_topk == "same" else eval_topk):
            check_topk(k, none_allowed=True)
        self.block_size, self.topk, self.eval_topk = block_size, topk, eval_topk
        self.options = options

    @property
    def current_topk(self) -> int | None:
        """The one of training or of evaluation, whichever the module is in."""
        return self.topk if self.training or self.eval_topk == "same" else self.eval_topk

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """`flex_moba` of q ``(B, Hq, Lq, D)``, k ``(B, Hkv, Lk, D)`` and v ``(B, Hkv, Lk, Dv)``.

        Keyword arguments are those of `flex_moba`, and win over the module's.
        """
        return flex_moba(q, k, v, self.block_size, self.current_topk, **self.options | options)

    def extra_repr(self) -> str:
        """What `print` shows."""
        shown = {"block_size": self.block_size, "topk": self.topk}
        if self.eval_topk != "same":
            shown["eval_topk"] = self.eval_topk
        return ", ".join(f"{name}={value!r}" for name, value in (shown | self.options).items())
