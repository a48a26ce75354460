"""The options of an attention call that every backend takes.

They are a NamedTuple because torch.compile traces its construction in every supported version.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

ImplName = Literal["auto", "fused", "routed", "masked", "portable"]
IMPLS: tuple[ImplName, ...] = get_args(ImplName)


class AttentionOptions(NamedTuple):
    """The options of an attention call, the same for every backend.

    Attributes:
        impl: The name of the backend, already resolved.
        scale: Factor on the scores.
        is_causal: Whether a query attends to its own block, causally, in addition to its routed
            blocks.
        kernel_options: The caller's kernel options for FlexAttention, or None.
    """

    impl: ImplName
    scale: float
    is_causal: bool = True
    kernel_options: Mapping[str, Any] | None = None
