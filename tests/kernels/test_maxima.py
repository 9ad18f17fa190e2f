"""Maintained maxima against a full scan."""

import pytest
import torch

from dqrm.kernels.maxima import FANOUT, MaxTree, bound_nodes


def scan(weight, table_rows):
    return torch.stack([rows.abs().max() for rows in weight.split(table_rows)])


@pytest.mark.parametrize(
    "table_rows",
    [[1], [1, 1, 1], [FANOUT, FANOUT + 1, 1], [5, FANOUT**2 + 3, 2, 700]],
    ids=["one-row", "three-one-row-tables", "level-edges", "ragged"],
)
def test_equals_a_full_scan_after_1000_random_updates(table_rows):
    torch.manual_seed(1)
    rows = sum(table_rows)
    weight = torch.randn(rows, 4)
    starts = torch.cumsum(torch.tensor(table_rows), 0) - torch.tensor(table_rows)
    tree = MaxTree(table_rows)
    tree.rebuild(weight)
    assert torch.equal(tree.table_max, scan(weight, table_rows))
    for _ in range(1000):
        touched = torch.unique(torch.randint(0, rows, (3,)))
        # Shrinking rows matter most: a running maximum would miss them.
        weight[touched] = torch.randn(len(touched), 4) * torch.rand(()) * 2
        tree.update(touched, weight[touched], starts)
        assert torch.equal(tree.table_max, scan(weight, table_rows))
    assert torch.equal(tree.row_max, weight.abs().amax(dim=1))


def test_the_largest_row_may_shrink_to_zero():
    weight = torch.zeros(200, 2)
    weight[150] = -3.0
    tree = MaxTree([200])
    tree.rebuild(weight)
    assert tree.table_max.tolist() == [3.0]
    tree.update(torch.tensor([150]), torch.zeros(1, 2), torch.tensor([0]))
    assert tree.table_max.tolist() == [0.0]


def test_no_rows_change_nothing():
    tree = MaxTree([3])
    tree.rebuild(torch.ones(3, 2))
    tree.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 2), torch.tensor([0]))
    assert tree.table_max.tolist() == [1.0]


def test_nodes_of_the_compiled_tree_by_hand():
    # Blocks of 64 rows, then 64 blocks a node: 1, 1, 2 + 1, 79 + 2 + 1.
    assert bound_nodes([1, 64, 65, 5000]) == 1 + 1 + 3 + 82
