"""Paged attention for servers: a page holds the keys, values and mean keys of one block.

`append_paged` writes new tokens into pages, and `attend_paged` attends to the pages of a ragged
batch of prefill chunks and decoding steps. The server owns the pages and decides which sequence
uses them.
"""

from flexmoba.paged.append import append_paged
from flexmoba.paged.attention import attend_paged
from flexmoba.paged.batch import PagedBatch, paged_batch
from flexmoba.paged.pages import Pages

__all__ = ["PagedBatch", "Pages", "append_paged", "attend_paged", "paged_batch"]
