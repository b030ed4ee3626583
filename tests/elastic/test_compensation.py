"""What narrower widths have of their own, as a module."""

import torch

from flextron_lit.elastic.compensation import Compensation


def test_parameters_have_one_order_whatever_that_of_the_names():
    named = {f"{kind}.{width}": torch.ones(2, width) for kind in ("projections", "scales") for width in (128, 32, 64)}
    orders = (named, dict(reversed(named.items())), dict(sorted(named.items())))
    found = [[name for name, _ in Compensation(each).named_parameters()] for each in orders]
    assert found[0] == found[1] == found[2]
    assert found[0][:3] == ["projections.32", "projections.64", "projections.128"]
