"""The sequences of a row of the batch: packed documents, or the real tokens of a padded row.

`lay_out` divides every sequence into blocks that begin at its first token.
"""

from flexmoba.sequence.arrange import lay_out, without_padding
from flexmoba.sequence.documents import Packing, packing_of, positions_of
from flexmoba.sequence.layout import InPlaceLayout, Layout, Sequences, WindowLayout

__all__ = [
    "InPlaceLayout",
    "Layout",
    "Packing",
    "Sequences",
    "WindowLayout",
    "lay_out",
    "packing_of",
    "positions_of",
    "without_padding",
]
