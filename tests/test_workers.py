"""The threads of the portable backend on a CPU."""

import threading
from collections.abc import Iterator

import pytest
import torch

from flexmoba import flex_moba
from flexmoba.backends.portable.workers import map_pieces
from tests.conftest import assert_bitwise_equal, make_pieces_small, with_lse
from tests.problems import Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results_of(problem: Problem) -> tuple[torch.Tensor, ...]:
    inputs = problem.tensors(requires_grad=True)
    attend = with_lse(flex_moba, problem.block_size, problem.topk, is_causal=problem.is_causal)
    out, lse = attend(*inputs)
    return out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), inputs)


@pytest.mark.parametrize(
    "changes",
    [{}, {"is_causal": False}, {"q_len": 60, "block_size": 50, "dtype": torch.float16}],
    ids=["causal", "not causal", "half"],
)
def test_results_do_not_depend_on_the_number_of_threads(changes, monkeypatch):
    make_pieces_small(monkeypatch)
    problem = Problem(**(vars(Problem(
        batch=2, kv_heads=2, group=2, q_len=300, kv_len=300, block_size=32, topk=3,
        dtype=torch.float32,
    )) | changes))  # fmt: skip
    results = []
    for n_threads in (1, 2, 3, 2):
        torch.set_num_threads(n_threads)
        results.append(results_of(problem))
        assert torch.get_num_threads() == n_threads
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_bitwise_equal(x, y)


def test_pieces_run_in_threads_of_one_thread_and_return_in_order():
    together = threading.Barrier(2, timeout=30)  # two pieces at a time, or an error

    def piece(i: int) -> tuple[int, int, bool, bool]:
        together.wait()
        return (
            i,
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    assert [*map_pieces(piece, range(10), CPU)] == [(i, 1, False, False) for i in range(10)]
    with torch.inference_mode():
        assert [*map_pieces(piece, range(2), CPU)] == [(i, 1, False, True) for i in range(2)]
    assert torch.get_num_threads() == 2
    counts = []  # of a thread that starts after the workers
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert counts == [2]


def test_inference_mode():
    problem = Problem(q_len=300, kv_len=300, block_size=32, topk=3, dtype=torch.float32)
    expected = results_of(problem)[0]
    with torch.inference_mode():
        assert_bitwise_equal(flex_moba(*problem.tensors(), 32, 3), expected)


def test_an_error_of_a_piece_is_raised():
    def piece(i: int) -> int:
        if i == 3:
            raise ValueError("piece 3")
        return i

    with pytest.raises(ValueError, match="piece 3"):
        list(map_pieces(piece, range(100), CPU))
    assert [*map_pieces(lambda i: i, range(100), CPU)] == [*range(100)]
