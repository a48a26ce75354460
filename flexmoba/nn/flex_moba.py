"""`FlexMoba`: a module that calls `flex_moba`."""

import inspect
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from flexmoba.attention import flex_moba
from flexmoba.checks import check_block_size, check_gate, check_gate_block_size, check_topk

if TYPE_CHECKING:
    from flexmoba.distributed import SequenceShards

_OPTIONS = [
    name
    for name, parameter in inspect.signature(flex_moba).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


class FlexMoba(nn.Module):
    """Module that calls `flex_moba` with fixed options. It has no parameters.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2. The options may change at any time, for
    example between two steps of training: the paper's Sec. 2.3 switches between MoBA and full
    attention; see `flexmoba.hybrid.set_attention`. ``torch.compile`` compiles a model once for each
    combination of options.

    Args:
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own block included, at least 1; None for full
            attention.
        eval_topk: ``topk`` outside training (``module.eval()``); ``"same"`` for the value of
            ``topk``.
        options: Keyword arguments for every call of `flex_moba`, such as ``gate="tile"`` or
            ``sink_blocks=1``.

    Attributes:
        block_size: Keys in a block; may be changed, like ``topk`` and ``eval_topk``.
        topk: Blocks in training.
        eval_topk: Blocks outside training.
        options: The other options, by name.
        sequence_shards: The ranks that share each sequence, from
            `flexmoba.distributed.ContextParallel`; None on one device.

    Raises:
        TypeError: ``block_size`` or a ``topk`` is not an int, or `flex_moba` has no such option.
        ValueError: ``block_size`` or a ``topk`` is less than 1, or does not fit the gate.
        NotImplementedError: The gate does not support this block size.

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
        """Checks and stores the options."""
        super().__init__()
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(
                    f"flex_moba has no option {name!r}; use one of {', '.join(_OPTIONS)}"
                )
        self.options = options
        self.check(block_size, topk, eval_topk)
        self.block_size, self.topk, self.eval_topk = block_size, topk, eval_topk
        self.sequence_shards: SequenceShards | None = None

    @property
    def current_topk(self) -> int | None:
        """The number of blocks in the current mode: ``topk`` in training, else ``eval_topk``."""
        return self.topk if self.training or self.eval_topk == "same" else self.eval_topk

    def check(
        self, block_size: int, topk: int | None, eval_topk: int | Literal["same"] | None
    ) -> None:
        """Raises the constructor's errors unless these settings fit the options of the module."""
        check_block_size(block_size)
        option = self.options.get
        check_gate_block_size(option("gate_block_size"), block_size)
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
        """Returns the result of `flex_moba`.

        Args:
            q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64.
            k: Keys, ``(B, Hkv, Lk, D)`` in the dtype of q.
            v: Values, ``(B, Hkv, Lk, Dv)`` in the dtype of q.
            options: Keyword arguments of `flex_moba`. They override the options of the module.

        Returns:
            The output, ``(B, Hq, Lq, Dv)`` in the dtype of q; with ``return_aux``, the pair that
            `flex_moba` returns.
        """
        options = self.options | options
        if self.sequence_shards is not None and not hasattr(q, "device_mesh"):  # not for DTensors
            attend = self.sequence_shards.attend
            return attend(q, k, v, self.block_size, self.current_topk, **options)
        return flex_moba(q, k, v, self.block_size, self.current_topk, **options)

    def extra_repr(self) -> str:
        """Returns the options, for ``repr``."""
        shown = {"block_size": self.block_size, "topk": self.topk}
        if self.eval_topk != "same":
            shown["eval_topk"] = self.eval_topk
        return ", ".join(f"{name}={value!r}" for name, value in (shown | self.options).items())
