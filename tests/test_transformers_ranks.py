"""Converted models of transformers whose sequences are spread over two processes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

pytest.importorskip("transformers")

from flexmoba.distributed import ContextParallel
from flexmoba.integrations.transformers import convert
from tests import tiny_models
from tests.processes import Processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
LENGTHS = (37, 23)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(2, tmp_path_factory.mktemp("transformers"))
    yield processes
    processes.stop()


def converted(family: str) -> torch.nn.Module:
    model = tiny_models.model_of(family).train()
    convert(model, block_size=8, topk=3)
    return model


def results_of(model: torch.nn.Module, upstream: Tensor, **inputs: Any) -> list[Tensor]:
    logits = model(**inputs, use_cache=False).logits
    parameters = [*model.parameters()]
    return [logits.detach(), *torch.autograd.grad(logits, parameters, upstream)]


def on_ranks(
    mesh: DeviceMesh, family: str, upstream: Tensor, inputs: dict[str, Any]
) -> list[Tensor]:
    model = parallelize_module(converted(family), mesh, ContextParallel())
    return results_of(model, upstream, **inputs)


def inputs_of(boundaries: list[int] | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Token ids, positions, and the argument for documents."""
    total = sum(LENGTHS)
    ids, positions = tiny_models.tokens(1, total), torch.arange(total)
    if boundaries is None:
        return ids, positions[None], {}
    cu = torch.tensor(boundaries, dtype=torch.int32)
    positions -= cu[torch.searchsorted(cu, positions, right=True) - 1]
    return ids, positions[None], {"cu_seq_lens_q": cu}


def spread(ranks: Processes, family: str, positions: Tensor, **inputs: Any) -> list[Any]:
    ids = tiny_models.tokens(1, sum(LENGTHS))
    upstream = torch.randn(1, sum(LENGTHS), tiny_models.VOCABULARY, dtype=torch.float64)
    shards = zip(*(x.split(LENGTHS, 1) for x in (ids, positions, upstream)), strict=True)
    arguments = []
    for mine, places, up in shards:
        given = {"input_ids": mine.clone(), "position_ids": places.clone()} | inputs
        arguments.append((family, up.clone(), given))
    return [upstream, *ranks.run(on_ranks, arguments)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("boundaries", [None, [0, 20, 45, 60], [0, 37, 60]], ids=str)
def test_models_equal_one_process(ranks, family, boundaries):
    ids, positions, documents = inputs_of(boundaries)
    upstream, *results = spread(ranks, family, positions, **documents)
    for result in results:
        if isinstance(result, Exception):
            raise result
    expected = results_of(
        converted(family), upstream, input_ids=ids, position_ids=positions, **documents
    )
    torch.testing.assert_close(torch.cat([result[0] for result in results], 1), expected[0])
    for value, *parts in zip(expected[1:], *(result[1:] for result in results), strict=True):
        torch.testing.assert_close(sum(parts), value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_mask": torch.zeros(1, 1)}, "given padding or packed documents"),
        ("llama", {"position_ids": torch.tensor([[0, 1, 0, 1]])}, "padding or packed documents"),
        ("lfm2", {}, "layers of type conv, which ContextParallel does not support"),
        ("local qwen3", {}, "layers of type sliding_attention, which"),
    ],
)
def test_other_tokens_of_other_ranks_are_refused(ranks, family, changes, message):
    arguments = []
    for first in (0, 4):
        positions = torch.arange(first, first + 4)[None]
        given = {"input_ids": tiny_models.tokens(1, 4), "position_ids": positions} | changes
        if "attention_mask" in changes:
            given["attention_mask"] = torch.tensor([[0, 1, 1, 1]])
        arguments.append((family, torch.zeros(1, 4, tiny_models.VOCABULARY), given))
    for error in ranks.run(on_ranks, arguments):
        with pytest.raises(NotImplementedError, match=message):
            raise error


def from_zero(mesh: DeviceMesh) -> str:
    model = parallelize_module(converted("llama"), mesh, ContextParallel(equal_lengths=True))
    if mesh.get_local_rank() == 0:
        return ""
    with pytest.raises(ValueError, match="pass position_ids of the complete sequence") as error:
        model(tiny_models.tokens(1, 4))
    return str(error.value)


def test_positions_of_a_shard_are_those_of_the_sequence(ranks):
    assert "from 0 on, on rank 1 of ContextParallel" in ranks.run(from_zero, [()] * 2)[1]
