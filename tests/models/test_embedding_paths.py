"""The collection through autograd, without it, compiled, copied, and in plain torch."""

import copy
import pickle
import shutil

import pytest
import torch

from dqrm.kernels.cpu import native_available
from dqrm.kernels.embedding import TableBatch
from dqrm.kernels.embedding_reference import TableBatchReference
from dqrm.models.embedding import EmbeddingBagCollection, Table
from dqrm.training.config import OptimConfig
from dqrm.training.row_optimizers import RowOptimizer

needs_kernels = pytest.mark.skipif(not native_available(), reason="compiled kernels not installed")
ROWS = (10, 3, 500)


def collection(bits=(4, 32, 8), dim=16, **settings):
    torch.manual_seed(0)
    tables = [Table(f"t{n}", r, b) for n, (r, b) in enumerate(zip(ROWS, bits, strict=True))]
    return EmbeddingBagCollection(tables, dim, **settings)


def ids_of(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randint(0, r, (batch,), generator=generator) for r in ROWS])


def train(emb, name, by_autograd, steps=4):
    optimizer = RowOptimizer(emb, OptimConfig(name=name, embedding_weight_decay=0.01))
    for step in range(steps):
        ids = ids_of(20, step)
        grad = torch.randn(20, 3, 16, generator=torch.Generator().manual_seed(step))
        if by_autograd:
            emb.weight.grad = None
            emb(ids).backward(grad)
            optimizer.step(emb.row_gradient(), 0.1)
        else:
            buffer = torch.empty(20, 4, 16)
            emb.lookup(ids, None, buffer[:, 1:])
            optimizer.update(ids, None, grad, 0.1)
    return [emb.weight.detach(), emb.table_scale, *optimizer.state().values()]


@pytest.mark.parametrize("ste", ["pass", "clip"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_one_call_trains_as_autograd_does(name, ste):
    direct, through = (train(collection(ste=ste), name, way) for way in (False, True))
    for a, b in zip(direct, through, strict=True):
        assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("period", [0, 3])
def test_plain_torch_trains_as_the_compiled_loops_do(monkeypatch, period):
    compiled_model = collection(scale_period=period, ste="clip")
    compiled = train(compiled_model, "adam", by_autograd=False)
    monkeypatch.setattr("dqrm.kernels.embedding.native", lambda: None)
    plain_model = collection(scale_period=period, ste="clip")
    plain = train(plain_model, "adam", by_autograd=False)
    assert isinstance(compiled_model.kernel, TableBatch)
    assert isinstance(plain_model.kernel, TableBatchReference)
    for a, b in zip(compiled, plain, strict=True):
        assert torch.equal(a, b)


def test_lookup_equals_forward_and_counts_it():
    emb = collection(scale_period=2)
    out = torch.empty(20, 3, 16)
    emb.lookup(ids_of(20), None, out)
    assert torch.equal(out, emb(ids_of(20)))
    assert emb.forwards.item() == 2


def test_weighted_bags_and_their_gradient():
    emb = collection(bits=(32, 32, 32))
    ids = torch.tensor([1, 2, 0, 7])
    offsets = torch.tensor([0, 2, 3, 4])
    weights = torch.tensor([0.5, -2.0, 3.0, 1.0])
    a, b, c = emb.table_rows()
    out = emb(ids, offsets, weights)
    expected = torch.stack([0.5 * a[1] - 2 * a[2], 3 * b[0], c[7]])
    assert torch.equal(out[0], expected)
    out.backward(torch.ones(1, 3, 16))
    assert emb.row_gradient().rows.tolist() == [1, 2, 10, 20]
    assert emb.row_gradient().values[:, 0].tolist() == [0.5, -2.0, 3.0, 1.0]


def test_gradients_of_two_backwards_add_up():
    emb = collection()
    for ids in ([1, 2, 3], [1, 0, 4]):
        emb(torch.tensor(ids)).sum().backward()
    rows, values = emb.row_gradient()
    assert rows.tolist() == [1, 10, 12, 16, 17]
    assert values[:, 0].tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_rows_of_its_own(duplicate, storage):
    emb = collection(storage=storage)
    emb(ids_of(5))
    twin = duplicate(emb)
    before = emb(ids_of(5))
    assert torch.equal(twin(ids_of(5)), before)
    optimizer = RowOptimizer(twin, OptimConfig(name="sgd"))
    optimizer.update(ids_of(5), None, torch.ones(5, 3, 16), 1.0)
    assert torch.equal(emb(ids_of(5)), before)
    assert not torch.equal(twin(ids_of(5)), before)


def test_rows_follow_a_weight_that_moved():
    emb = collection()
    emb(ids_of(5))
    emb.share_memory()
    with torch.no_grad():
        emb.weight.fill_(1.0)
    emb.refresh_scales()
    assert torch.allclose(emb(ids_of(5)), torch.ones(5, 3, 16))


def test_the_operator_keeps_the_rules_of_torch():
    emb = collection()
    ids, offsets = torch.tensor([1, 2, 0, 7]), torch.tensor([0, 2, 3, 4])
    for arguments in [(ids_of(4), None, None), (ids, offsets, None), (ids, offsets, torch.ones(4))]:
        torch.library.opcheck(
            torch.ops.dqrm.embedding_lookup.default,
            (emb.weight, emb.weight, emb.table_scale, *arguments, emb._kernel.handle),
            # Compiled backwards know no sparse gradients: the collection stays out of them.
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_looks_up_and_trains():
    emb = collection()

    def model(ids):
        return (emb(ids) * 2).square().sum(dim=2)

    compiled = torch.compile(model)
    with torch.no_grad():
        expected = model(ids_of(6))
        got = torch.compile(model, fullgraph=True)(ids_of(6))
        torch.testing.assert_close(got, expected)
    model(ids_of(6)).sum().backward()
    values = emb.row_gradient().values
    emb.weight.grad = None
    compiled(ids_of(6)).sum().backward()
    torch.testing.assert_close(emb.row_gradient().values, values)
