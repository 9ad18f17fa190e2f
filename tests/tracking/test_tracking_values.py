from pathlib import Path

import pytest

from dqrm.tracking.values import MAX_PARAM_LENGTH, clean_key, cut, flatten, numbers


def test_flatten_writes_values_that_work_as_overrides() -> None:
    config = {
        "quant": {"bits": 4, "table_bits": {"C3": 8}, "ste": "pass"},
        "model": {"top_mlp": [512, 256], "dropout": 0.5},
        "train": {"max_steps": None, "shuffle": False},
        "empty": {},
        "path": Path("runs/a"),
    }
    assert dict(flatten(config)) == {
        "quant.bits": "4",
        "quant.table_bits.C3": "8",
        "quant.ste": "pass",
        "model.top_mlp": "[512, 256]",
        "model.dropout": "0.5",
        "train.max_steps": "null",
        "train.shuffle": "false",
        "empty": "{}",
        "path": "runs/a",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), ".nan"), (float("inf"), ".inf"), (float("-inf"), "-.inf")],
    ids=["nan", "inf", "minus-inf"],
)
def test_numbers_without_json_form_are_written_as_in_yaml(value: float, text: str) -> None:
    assert dict(flatten({"x": value})) == {"x": text}


def test_long_value_is_cut_visibly() -> None:
    [(_, value)] = flatten({"x": "a" * 7000})
    assert len(value) == MAX_PARAM_LENGTH
    assert value.endswith("aaa ... [cut: 7000 characters, whole in config.yaml]")
    assert cut("a" * MAX_PARAM_LENGTH, MAX_PARAM_LENGTH, "") == "a" * MAX_PARAM_LENGTH


def test_keys_that_mlflow_refuses_are_mended() -> None:
    assert clean_key("quant.table_bits.price[$]") == "quant.table_bits.price___"
    assert len(clean_key("k" * 300)) == 250


def test_numbers_keeps_what_is_one() -> None:
    kept = numbers({"a": 1, "b": float("inf"), "c": None, "d": "text", "e": True})
    assert kept == {"a": 1.0, "b": float("inf"), "e": 1.0}
