"""Settings of the suite, and the one tolerance policy of all comparisons.

The error of a result may be at most twice, and the error of a gradient three times, the error of
dense masked attention in the same dtype. Both errors are differences from float64, and all three
computations use the same selection.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.backends.flex import masked
from flexmoba.reference import reference_attention

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(1)  # tensors in tests are small, and workers share the cores

FACTORS = {"out": 2, "lse": 2, "gradient": 3}
# The error that every result may have, in roundings of the largest value. Half precision
# accumulates in float32 and rounds once. The error of float64 cannot be measured, because the
# comparison is float64, too: its allowance is above the sum of the roundings in these tests, and
# far below one rounding of float32.
ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 16, torch.float64: 1024}

# Sizes of pieces for loops over pieces, so that drawn problems have several pieces, and most pieces
# have several tiles or queries.
SMALL_PIECES = {
    "flexmoba.gate.scores._SCORES_AT_ONCE": 2**9,
    "flexmoba.nsa.select._SCORES_AT_ONCE": 2**9,
    "flexmoba.backends.portable.modified_scores._SCORES_AT_ONCE": 4 * 128 * 16,
    "flexmoba.backends.portable.operator._QUERIES_AT_ONCE": 13,
    "flexmoba.backends.portable.operator._SCORES_AT_ONCE": 4 * 128 * 16,
    "flexmoba.distributed.gather.BYTES_AT_ONCE": 1,
    "flexmoba.tune.quality._SCORES_AT_ONCE": 2**8,
}

Attend = Callable[..., tuple[Tensor, Tensor]]


def make_pieces_small(patch: pytest.MonkeyPatch) -> None:
    """Makes every loop over pieces take several pieces, also for a small problem."""
    for name, size in SMALL_PIECES.items():
        patch.setattr(name, size)


def leave_flex_uncompiled(patch: pytest.MonkeyPatch) -> None:
    """Runs FlexAttention without torch.compile, which takes a second to trace each shape."""
    patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    patch.setattr(masked, "run_compiled", lambda f, *tensors, **static: f(*tensors, **static))


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_pieces_small(patch)
        yield


@pytest.fixture(scope="module")
def uncompiled_flex() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_flex_uncompiled(patch)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()  # for other processes that test on the same GPU


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> None:
    """Resets dynamo, so that its counts of compilations do not depend on files that ran before."""
    torch._dynamo.reset()


def with_lse(function: Callable, *args, **options) -> Attend:
    """Returns ``function`` as a map from q, k and v to the output and the log-sum-exp."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = function(q, k, v, *args, **options, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return attend


def assert_as_exact_as_dense(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    gradients: bool = False,
    **options: Any,
) -> None:
    """Asserts that output and log-sum-exp of ``attend(q, k, v)`` obey the policy, on any device.

    Args:
        attend: The function to test.
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, Lk, D)``.
        v: ``(B, Hkv, Lk, Dv)``.
        mask: ``(B, Hq, Lq, Lk)`` bools, the keys that each query attends to.
        scale: Factor on the scores.
        gradients: Whether to also compare the gradients of q, k and v, given random gradients of
            both results.
        options: Further options of `reference_attention`.
    """

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference_attention(q, k, v, mask, scale=scale, **options)

    assert_as_exact_as(dense, attend, (q, k, v), gradients=gradients)


def assert_as_exact_as(
    dense: Attend, attend: Attend, inputs: Sequence[Tensor], *, gradients: bool = False
) -> None:
    """Asserts that output and log-sum-exp of ``attend(*inputs)`` obey the policy.

    Args:
        dense: The definition, which computes in the dtype of its inputs.
        attend: The function to test.
        inputs: Tensors of one dtype, the arguments of both functions.
        gradients: Whether to also compare the gradients of all inputs, given random gradients of
            both results.
    """
    in_dtype = inputs[0].dtype
    lse_dtype = torch.promote_types(in_dtype, torch.float32)  # float32 for half precision
    actual = _results(attend, inputs, in_dtype, gradients)
    exact = _results(dense, inputs, torch.float64, gradients)
    baseline = _results(dense, inputs, in_dtype, gradients)
    baseline["lse"] = _results(dense, inputs, lse_dtype, gradients)["lse"]

    # Dense attention may be exact by luck, so its error counts as at least some roundings of the
    # largest value. The largest value of a gradient is that of all gradients, because terms
    # of one gradient can cancel that are as large as the others (dq is zero for a query with one
    # key). The largest value of a logarithm is at least 1, because its absolute error is the
    # relative error of the weights.
    largest = {name: _largest(x.where(x.isfinite(), 0.0)) for name, x in exact.items()}
    units = largest | {"lse": max(1.0, largest["lse"])}
    names = [name for name in exact if name not in ("out", "lse")]
    units |= {name: max(largest[n] for n in names) for name in names}
    for name, x in actual.items():
        assert x.dtype == (lse_dtype if name == "lse" else in_dtype), name
        assert_within_policy(name, x, exact[name], baseline[name], units[name])


def assert_within_policy(
    name: str, actual: Tensor, exact: Tensor, baseline: Tensor, unit: float
) -> None:
    """Asserts that a result obeys the policy.

    Args:
        name: ``"out"``, ``"lse"``, or the name of a gradient.
        actual: The result, in the dtype of which the policy allows some roundings.
        exact: The same in float64.
        baseline: The same of dense attention in the dtype of the result.
        unit: The value that is rounded, such as the largest one.
    """
    assert actual.shape == exact.shape, name
    error, dense_error = (_max_error(x, exact) for x in (actual, baseline))
    floor = ROUNDINGS[actual.dtype] * torch.finfo(actual.dtype).eps * unit
    allowed = FACTORS.get(name, FACTORS["gradient"]) * (dense_error + floor)
    assert error <= allowed, (  # not "error > allowed: fail", which would let NaN pass
        f"{name}, {actual.dtype}: error {error:.3g}, allowed {allowed:.3g}; dense attention has "
        f"{dense_error:.3g}, the largest value is {_largest(exact):.3g}"
    )


def block_scores(
    q: Tensor, k: Tensor, block_size: int, gate_block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the gate's scores in float64, ``(B, Hq, Lq, blocks)``, and their uncertainty.

    In another order of summation, an element of a mean key may round to a neighbouring number,
    which changes the score.
    """
    q, eps = q.double(), torch.finfo(k.dtype).eps
    scores, uncertainties = [], []
    for block in k.double().split(block_size, dim=2):
        parts = block.split(gate_block_size or block_size, dim=2)
        means = torch.stack([part.mean(2) for part in parts], dim=2)
        means = means.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores.append((q @ means.mT).amax(-1))
        uncertainties.append(2 * eps * (q.abs() @ means.mT.abs()).amax(-1))
    return torch.stack(scores, -1), torch.stack(uncertainties, -1)


def assert_near_ties(actual: Tensor, expected: Tensor, scores: tuple[Tensor, Tensor]) -> Tensor:
    """Asserts that selections, as bools, differ only in near ties; returns the rows that differ.

    ``scores`` are from `block_scores`.
    """
    score, uncertainty = scores
    differ = (actual != expected).any(-1)
    only_here, only_there = actual & ~expected, expected & ~actual
    highest = (score - uncertainty).where(only_there, -torch.inf).amax(-1)
    lowest = (score + uncertainty).where(only_here, torch.inf).amin(-1)
    assert (actual.sum(-1) == expected.sum(-1)).all()
    assert (lowest >= highest)[differ].all(), "a block was left out for one that scores less"
    return differ


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Asserts that all elements are equal; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def _results(
    function: Attend, inputs: Sequence[Tensor], dtype: torch.dtype, gradients: bool
) -> dict[str, Tensor]:
    """Computes output, log-sum-exp and gradients in ``dtype`` from the same inputs."""
    in_dtype = inputs[0].dtype
    inputs = [x.detach().to(dtype).requires_grad_(gradients) for x in inputs]
    out, lse = function(*inputs)
    results = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(0)
        upstream = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, in_dtype)
            for x in (out, lse)
        ]
        upstream = [x.to(result) for x, result in zip(upstream, (out, lse), strict=True)]
        grads = torch.autograd.grad((out, lse), inputs, upstream)
        results |= {f"gradient of input {i}": grad for i, grad in enumerate(grads)}
    return results


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _max_error(actual: Tensor, exact: Tensor) -> float:
    """Returns the largest absolute difference; a mean would hide a bad row among good ones."""
    actual = actual.double()
    return _largest(torch.where(actual == exact, 0.0, actual - exact))  # inf == inf
