"""`flexmoba.nn`: modules around the operator."""

import pytest
import torch

from flexmoba import flex_moba
from flexmoba.nn import FlexMoba
from tests.conftest import assert_bitwise_equal


def test_flex_moba_as_a_module_is_the_function():
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    module = FlexMoba(16, 3, eval_topk=2, gate="group")
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 3, gate="group"))
    assert_bitwise_equal(module(q, k, v, gate="token"), flex_moba(q, k, v, 16, 3))
    module.eval()
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 2, gate="group"))
    module.eval_topk = "same"
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 3, gate="group"))
    assert not module.state_dict()
    assert repr(module) == "FlexMoba(block_size=16, topk=3, gate='group')"


@pytest.mark.parametrize("sizes", [(0, 2, 1), (4, 0, 1), (4, 2, 0)])
def test_flex_moba_as_a_module_refuses_sizes(sizes):
    with pytest.raises(ValueError, match="got 0"):
        FlexMoba(*sizes[:2], eval_topk=sizes[2])
