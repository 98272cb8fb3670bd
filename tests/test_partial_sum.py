"""The debt between a row-parallel layer and the next norm cannot be paid twice, to the wrong group, or lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.comm import SingleComm
from core_torch.layers.norm import RMSNorm
from core_torch.partial_sum import DebtError, PartialSum
from tests.fusion_ranks import decide


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    yield
    PartialSum.open_debts = 0


def group(name: str = "g") -> ReduceGroup:
    return ReduceGroup(name, "mlp", (0,), 0, None, SingleComm(), decide(1))


def test_taking_twice_is_an_error() -> None:
    debt = PartialSum(torch.ones(2, 4), group())
    debt.take()
    with pytest.raises(DebtError, match="paid twice"):
        debt.take()


def test_debts_of_different_groups_do_not_merge() -> None:
    with pytest.raises(DebtError, match="'a' with one over 'b'"):
        _ = PartialSum(torch.ones(1), group("a")) + PartialSum(torch.ones(1), group("b"))


def test_a_merged_debt_is_one_debt() -> None:
    g = group()
    a, b = PartialSum(torch.ones(2, 4), g), PartialSum(2 * torch.ones(2, 4), g)
    both = a + b
    assert torch.equal(both.take(), 3 * torch.ones(2, 4))
    PartialSum.check_settled()
    with pytest.raises(DebtError):
        a.take()


def test_a_lost_debt_is_found() -> None:
    PartialSum(torch.ones(2, 4), group())
    with pytest.raises(DebtError, match="1 partial sums were never reduced"):
        PartialSum.check_settled()
    PartialSum.check_settled()


def test_a_norm_pays_a_debt() -> None:
    norm = RMSNorm(4, 1e-6)
    norm.weight.zero_()
    residual, normed = norm.pay(PartialSum(torch.full((1, 4), 2.0), group()), torch.full((1, 4), 1.0))
    assert torch.equal(residual, torch.full((1, 4), 3.0))
    assert torch.allclose(normed, torch.ones(1, 4))
    PartialSum.check_settled()
