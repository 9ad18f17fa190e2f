"""The packed model answers exactly as the trained one."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.encode import RowEncoder
from dqrm.serving.artifact import load_artifact, save_artifact
from dqrm.serving.predictor import Predictor
from dqrm.training.build import build_model, sizes_of
from dqrm.training.evaluate import predict

VARIANTS = {
    "int4-table": {},
    "int4-row": {"granularity": "row"},
    "int2": {"bits": 2},
    "int8-mlp8": {"bits": 8, "mlp_bits": 8},
    "integer-mlp4": {"activation_bits": 8},
    "integer-mlp8": {"mlp_bits": 8, "activation_bits": 8},
    "integer-ends-fp32": {
        "activation_bits": 8,
        "skip_first_layer": True,
        "skip_last_layer": True,
    },
    "int16": {"bits": 16},
    "fp32": {"bits": 32, "mlp_bits": 32},
    "mixed": {"table_bits": {"user": 32, "tags": 8}, "skip_first_layer": True},
    "period": {"scale_period": 5, "skip_last_layer": True},
    "bf16-storage": {"storage": "bf16"},
    "bf16-storage-fp32": {"storage": "bf16", "bits": 32},
    "int8-storage": {"storage": "int8", "bits": 8, "granularity": "row"},
    "int4-storage": {"storage": "int4", "bits": 4, "granularity": "row"},
}


def trained(folder, quant, dim=5):
    """A model away from its initial weights; an odd width leaves half a byte over."""
    config = RunConfig.model_validate(
        {
            "quant": quant,
            "model": {"embedding_dim": dim, "bottom_mlp": [7], "top_mlp": [9], "pooling": "mean"},
        }
    )
    dataset = PreparedDataset.open(folder)
    torch.manual_seed(1)
    model = build_model(config, dataset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.emb_l.refresh_scales()
    return config, dataset, model.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def packed(request, clicks_data, tmp_path):
    config, dataset, model = trained(clicks_data, request.param)
    path = tmp_path / "model.safetensors"
    encoder = RowEncoder.from_dataset(clicks_data)
    size = save_artifact(path, model, config.model, encoder, dataset.manifest.features_digest)
    return config, dataset, model, path, size


def test_logits_equal_training_bit_for_bit(packed):
    _, dataset, model, path, _ = packed
    split = dataset.split("test")
    expected, labels = predict(model, split, 100)
    got, _ = predict(load_artifact(path).model, split, 100)
    assert len(labels) > 400
    assert torch.equal(got, expected)


def test_bytes_are_those_computed_beforehand(packed):
    config, dataset, _, path, size = packed
    assert size == sizes_of(config, dataset).packed_bytes
    assert load_artifact(path).packed_bytes == size
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith("vocabulary.")]  # noqa: SIM118
        assert sum(file.get_tensor(name).nbytes for name in names) == size


def test_int4_is_about_eight_times_smaller_than_fp32(clicks_data):
    config, dataset, _ = trained(clicks_data, {}, dim=16)
    sizes = sizes_of(config, dataset)
    assert sizes.fp32_bytes / sizes.packed_bytes > 6.5


def test_raw_rows_predict_like_the_prepared_ones(packed, clicks_frame):
    _, dataset, model, path, _ = packed
    probability = Predictor.load(path).predict(clicks_frame)
    assert probability.dtype == np.float32
    # The prepared splits hold the same rows in another order, and matrix products round
    # differently in batches of another size: a few units in the last place of each layer.
    logits = torch.cat([predict(model, dataset.split(s), 64)[0] for s in dataset.manifest.splits])
    expected = np.sort(torch.sigmoid(logits).numpy())
    np.testing.assert_allclose(np.sort(probability), expected, rtol=1e-5)


def test_values_never_seen_and_missing_columns_are_unknown(packed, clicks_frame):
    path = packed[3]
    predictor = Predictor.load(path)
    row = clicks_frame.head(1).copy()
    row["user"], row["item"] = "nobody", -5
    assert np.isfinite(predictor.predict(row)).all()
    assert predictor.predict(clicks_frame.head(0)).shape == (0,)


def test_large_tables_are_copied_to_huge_pages_and_answer_the_same(packed, monkeypatch):
    from dqrm.kernels import huge_pages

    _, dataset, model, path, _ = packed
    if not huge_pages.available():
        pytest.skip("this system has no huge pages")
    monkeypatch.setattr(huge_pages, "SMALLEST_BYTES", 1)
    split = dataset.split("test")
    assert torch.equal(
        predict(load_artifact(path).model, split, 64)[0], predict(model, split, 64)[0]
    )


def test_a_copy_and_a_loaded_state_are_looked_up_anew(packed):
    import copy

    artifact = load_artifact(packed[3])
    emb_l = artifact.model.emb_l
    ids = torch.zeros(len(emb_l.tables), dtype=torch.int64)
    before = emb_l(ids)
    assert torch.equal(copy.deepcopy(emb_l)(ids), before)
    state = {name: torch.zeros_like(tensor) for name, tensor in emb_l.state_dict().items()}
    emb_l.load_state_dict(state, assign=True)
    assert torch.equal(emb_l(ids), torch.zeros_like(before))
    assert torch.equal(emb_l(ids), emb_l.forward_reference(ids))


def test_a_damaged_file_is_refused(packed, tmp_path):
    path = packed[3]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read as a packed model"):
        load_artifact(cut)


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no packed model this dqrm reads: format None"):
        load_artifact(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no packed model"):
        Predictor.load(tmp_path / "nothing")


def test_a_newer_format_is_refused(packed, tmp_path):
    from safetensors.torch import load_file, save_file

    newer = tmp_path / "newer.safetensors"
    shutil.copy(packed[3], newer)
    with safe_open(newer, framework="pt") as file:
        metadata = file.metadata()
    metadata["format_version"] = json.dumps(99)
    save_file(load_file(packed[3]), newer, metadata=metadata)
    with pytest.raises(ValueError, match="version 99, wanted 'dqrm-artifact' version 1"):
        load_artifact(newer)
