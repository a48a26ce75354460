"""The options of an attention call, as every backend takes them.

They are a NamedTuple because torch.compile traces its construction in every supported version.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

ImplName = Literal["auto", "fused", "routed", "masked", "portable"]
IMPLS: tuple[ImplName, ...] = get_args(ImplName)


class AttentionOptions(NamedTuple):
    """The options that a caller gave, the same in every backend.

    Attributes:
        impl: The backend, which must be able to serve the inputs.
        scale: Factor on the scores.
        is_causal: Whether a query attends to its own block, causally, beside its routed blocks.
        kernel_options: FlexAttention's kernel options.
    """

    impl: ImplName
    scale: float
    is_causal: bool = True
    kernel_options: Mapping[str, Any] | None = None
