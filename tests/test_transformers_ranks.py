"""Converted models of transformers whose sequences are spread over two processes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

pytest.importorskip("transformers")

from transformers import PreTrainedModel, Trainer, TrainingArguments

from flexmoba.distributed import ContextParallel
from flexmoba.integrations.transformers import convert
from tests import tiny_models
from tests.processes import Processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
LENGTHS = (37, 23)
GATE_BLOCK_SIZES = {"qwen3": 2}  # the others have no sub-blocks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(2, tmp_path_factory.mktemp("transformers"))
    yield processes
    processes.stop()


def converted(family: str) -> torch.nn.Module:
    model = tiny_models.model_of(family).train()
    convert(model, block_size=8, topk=3, gate_block_size=GATE_BLOCK_SIZES.get(family))
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


# ---- Trainer ------------------------------------------------------------------------------------


def trainer_of_the_page() -> type[Trainer]:
    """The class in docs/distributed.md."""
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "ShardTrainer(" in x)
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "dist": dist}
    exec(code, names)
    trainer: type[Trainer] = names["ShardTrainer"]
    return trainer


class SameBatches(Trainer):
    """A Trainer with the batches of the class in docs/distributed.md, and the model's own loss."""

    def get_train_dataloader(self) -> Any:
        return trainer_of_the_page().get_train_dataloader(self)


def trained(trainer: type[Trainer], model: PreTrainedModel, folder: str) -> list[Tensor]:
    """Trains in two steps of two batches each, with labels that do not all count."""
    data = []
    for seed in range(8):
        ids = torch.randint(tiny_models.VOCABULARY, (50,), generator=torch.manual_seed(seed))
        labels = ids.where(torch.arange(50) % (seed + 2) != 0, -100)
        data.append({"input_ids": ids, "labels": labels})
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        optim="sgd",  # shows the size of gradients, too
        average_tokens_across_devices=False,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    made = trainer(model, arguments, train_dataset=data)
    made.train()
    losses = [x["loss"] for x in made.state.log_history if "loss" in x]
    return [torch.tensor(losses), *(x.detach() for x in model.parameters())]


def trained_on_ranks(mesh: DeviceMesh, folder: str) -> list[Tensor]:
    rank = str(mesh.get_local_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    model = parallelize_module(converted("llama"), mesh, ContextParallel())
    return trained(trainer_of_the_page(), model, folder)


def test_trainer_equals_one_process(ranks, tmp_path):
    before = [x.detach().clone() for x in converted("llama").parameters()]
    losses, *expected = trained(SameBatches, converted("llama"), str(tmp_path))
    for result in ranks.run(trained_on_ranks, [(str(tmp_path),)] * 2):
        if isinstance(result, Exception):
            raise result
        torch.testing.assert_close(result[0], losses, rtol=1e-3, atol=0)
        for actual, value, first in zip(result[1:], expected, before, strict=True):
            torch.testing.assert_close(actual - first, value - first)
            assert (value != first).any()


def test_context_parallelism_of_accelerate_is_refused_by_trainer():
    settings = SimpleNamespace(cp_enabled=True, cp_backend="torch")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=settings))
    with pytest.raises(ValueError, match="only with SDPA attention, you are using flexmoba"):
        Trainer._prepare_context_parallel_inputs(trainer, converted("llama"), {})
