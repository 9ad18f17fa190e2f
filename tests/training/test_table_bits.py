"""What bits are expected to cost each table: the oracle has gradients of whole tables."""

import itertools

import pytest
import torch
from torch.nn import functional

from dqrm.compress import grids
from dqrm.compress.signals.allocate import Candidate
from dqrm.compress.signals.budget import Budget, spend
from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.models.dlrm import DLRM
from dqrm.pipelines.stages.table_bits import TableBitsStage
from dqrm.training.build import build_model
from dqrm.training.table_bits import choose_table_bits, expected_losses

OPTIONS = (32, 16, 8, 4, 2)


@pytest.fixture
def dataset(clicks_data):
    return PreparedDataset.open(clicks_data)


def model_of(dataset, **quant):
    torch.manual_seed(0)
    settings = {
        "data": {"path": str(dataset.path)},
        "model": {"embedding_dim": 8, "bottom_mlp": [16], "top_mlp": [16], "dropout": 0.5},
        "quant": {"bits": 32, "mlp_bits": 32, **quant},
    }
    return build_model(RunConfig.model_validate(settings), dataset)


def batches_of(dataset, count=5, size=64):
    return list(itertools.islice(dataset.split("train").batches(size), count))


def by_whole_tables(model, batches, granularity):
    """Half the squared error times the mean squared gradient, with nothing sparse."""
    bags = model.emb_l
    fisher = torch.zeros(bags.num_rows, bags.embedding_dim, dtype=torch.float64)
    model.eval()
    for batch in batches:
        bags.leaf.grad = None
        logits = model(batch.dense, batch.indices, batch.offsets)
        functional.binary_cross_entropy_with_logits(logits, batch.label).backward()
        fisher += bags.leaf.grad.to_dense().double() ** 2 / len(batches)
    weight = bags.storage.read(torch.arange(bags.num_rows)).detach()
    found = torch.zeros(len(bags.tables), len(OPTIONS), dtype=torch.float64)
    for number, (table, start) in enumerate(
        zip(bags.tables, bags.table_start.tolist(), strict=True)
    ):
        rows = slice(start, start + table.num_rows)
        values = weight[rows]
        largest = values.abs().amax(1, keepdim=True) if granularity == "row" else values.abs().max()
        for place, bits in enumerate(OPTIONS):
            if bits == 32:
                continue
            code = grids.largest_code(bits)
            scale = grids.scale_of(largest, code)
            error = scale * grids.quantize(values, scale, code) - values
            found[number, place] = (fisher[rows] * error.double() ** 2).sum() / 2
    return found


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["table", "row"])
def test_losses_are_those_of_gradients_of_whole_tables(dataset, granularity, storage):
    # Scales of the tables to come, which the model says nothing of.
    model = model_of(dataset, storage=storage)
    batches = batches_of(dataset)
    wanted = by_whole_tables(model, batches, granularity)
    seen = []
    found = expected_losses(model, model.emb_l, batches, OPTIONS, granularity, seen.append)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert seen == [1, 2, 3, 4, 5]
    assert found[:, 0].eq(0).all()
    assert found[:, 2:].diff(dim=1).gt(0).all(), "fewer bits cost more"


def test_the_choice_is_the_best_of_all_within_the_budget(dataset):
    model = model_of(dataset)
    batches = batches_of(dataset)
    found = choose_table_bits(model, batches, Budget(None, 1), (8, 4, 2))
    spent = found.allocated
    names = list(found.rows)
    best = min(
        (
            spent.total(dict(zip(names, options, strict=True)))
            for options in itertools.product(range(3), repeat=len(names))
        ),
        key=lambda total: (total.cost > spent.budget, total.loss),
    )
    chosen = spent.total(spent.chosen)
    assert chosen.cost <= spent.budget == spent.uniform(1).cost
    assert chosen.loss == pytest.approx(best.loss)
    assert chosen.loss <= spent.uniform(1).loss
    assert found.bits == {name: (8, 4, 2)[spent.chosen[name]] for name in names}


def test_what_the_loss_does_not_depend_on_costs_nothing(dataset):
    model = model_of(dataset)
    with torch.no_grad():
        model.top_l[0].weight.zero_()
    found = choose_table_bits(model, batches_of(dataset), Budget(None, 0), (8, 2))
    assert found.allocated.total(found.allocated.chosen).loss == 0


def test_what_cannot_be_measured_is_refused(dataset):
    with pytest.raises(ValueError, match="no batch"):
        choose_table_bits(model_of(dataset), [], Budget(4.0, None))
    with pytest.raises(ValueError, match="the cheapest candidates cost"):
        choose_table_bits(model_of(dataset), batches_of(dataset), Budget(100.0, None))
    broken = model_of(dataset)
    with torch.no_grad():
        broken.top_l[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        choose_table_bits(broken, batches_of(dataset), Budget(4.0, None))
    packed = model_of(dataset)
    other = DLRM(packed.bot_l, torch.nn.Identity(), packed.interaction, packed.top_l)
    with pytest.raises(TypeError, match="Identity: packed or shared tables"):
        choose_table_bits(other, batches_of(dataset), Budget(4.0, None))


def test_a_budget_is_a_ratio_or_that_of_an_option():
    candidates = {
        "a": [Candidate(40, 0.0), Candidate(10, 2.0)],
        "b": [Candidate(80, 0.0), Candidate(20, 1.0)],
    }
    spent = spend(candidates, 480, Budget(4.8, None))
    assert (spent.budget, spent.chosen) == (100, {"a": 0, "b": 1})
    assert spent.best_uniform() == 1
    assert spend(candidates, 480, Budget(None, 0)).chosen == {"a": 0, "b": 0}
    assert spend(candidates, 480, Budget(None, 0)).best_uniform() == 0
    assert spent.uniform(0) == Candidate(120, 0.0)


def test_stages_from_before_there_were_scales_to_choose_stay_complete():
    before = {"stage": "table_bits", "recommender": "stage:fp32", "ratio": 12.0}
    whole = {**before, "options": [8, 4, 2], "like": None, "batches": 1000}
    assert TableBitsStage.model_validate(before).identity() == whole
    rows = TableBitsStage.model_validate({**before, "granularity": "row"})
    assert rows.identity() == {**whole, "granularity": "row"}
