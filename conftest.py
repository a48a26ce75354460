"""Runs every example of the documents and docstrings as a test."""

from typing import Any

import torch
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser
from sybil.sybil import SybilCollection


def forget_compilations(_: dict[str, Any]) -> None:
    """Lets a document compile functions that other tests of the process have compiled, too."""
    torch._dynamo.reset()


documents = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    setup=forget_compilations,
)
docstrings = Sybil(
    parsers=[DocTestParser()],
    patterns=["flexmoba/*.py", "flexmoba/*/*.py", "flexmoba/integrations/*/*.py"],
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = SybilCollection([documents, docstrings]).pytest()
