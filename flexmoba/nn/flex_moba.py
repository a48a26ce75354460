"""`FlexMoba`: `flex_moba` as a module."""

import inspect
from typing import Any, Literal

from torch import Tensor, nn

from flexmoba.attention import flex_moba
from flexmoba.checks import check_block_size, check_gate, check_topk

_OPTIONS = [
    name
    for name, parameter in inspect.signature(flex_moba).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


class FlexMoba(nn.Module):
    """`flex_moba` as a module: how many blocks of what size, and no parameters.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2. Its options may change at any time, between
    two steps of training, say: the paper's Sec. 2.3 switches between MoBA and full attention; see
    `flexmoba.hybrid.set_attention`. A compiled model compiles anew for each combination of options
    that it meets, once.

    Args:
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own included; None for full attention.
        eval_topk: The same outside training (``module.eval()``); ``"same"`` for no other.
        options: Keyword arguments for every call of `flex_moba`, such as ``gate="tile"`` or
            ``sink_blocks=1``.

    Raises:
        TypeError: ``block_size`` or a ``topk`` is no integer, or `flex_moba` has no such option.
        ValueError: One of them is not positive, or does not fit the gate.
        NotImplementedError: The gate does not serve this block size.

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
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"flex_moba has no option {name!r}; it has {', '.join(_OPTIONS)}")
        self.options = options
        self.check(block_size, topk, eval_topk)
        self.block_size, self.topk, self.eval_topk = block_size, topk, eval_topk

    @property
    def current_topk(self) -> int | None:
        """The one of training or of evaluation, whichever the module is in."""
        return self.topk if self.training or self.eval_topk == "same" else self.eval_topk

    def check(
        self, block_size: int, topk: int | None, eval_topk: int | Literal["same"] | None
    ) -> None:
        """Raises what the constructor would for these, given the module's options."""
        check_block_size(block_size)
        option = self.options.get
        for k in (topk, topk if eval_topk == "same" else eval_topk):
            check_topk(k, none_allowed=True)
            check_gate(
                option("gate", "token"),
                option("sink_blocks", 0),
                option("local_blocks", 0),
                None,
                block_size,
                k,
                is_causal=option("is_causal", True),
            )

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
