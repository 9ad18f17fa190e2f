"""What is searched: how it is written, and what is refused before anything runs."""

import pytest

from dqrm.sweeps.space import Choices, Range, check_space, split_arguments
from dqrm.yaml_text import ConfigError


def test_ranges_choices_and_what_is_fixed():
    searches, fixed = split_arguments(
        [
            "optim.lr=log:1e-3..1e-1",
            "model.dropout=0...5",
            "train.epochs=1..3",
            "quant.bits=4,8",
            "model.top_mlp=[64],[128, 64]",
            "data.path=../elsewhere",
            "optim.betas=[0.9, 0.99]",
            "tracking.tags={a: b, c: d}",
        ]
    )
    assert searches == {
        "optim.lr": Range("optim.lr", "1e-3", "1e-1", log=True),
        "model.dropout": Range("model.dropout", "0", ".5", log=False),
        "train.epochs": Range("train.epochs", "1", "3", log=False),
        "quant.bits": Choices("quant.bits", ("4", "8")),
        "model.top_mlp": Choices("model.top_mlp", ("[64]", "[128, 64]")),
    }
    assert len(fixed) == 3
    base, space = check_space(searches, "census", ["train.patience=2"])
    assert base.train.patience == 2
    assert space.whole == {"train.epochs"}
    # As it stands in sweep.yaml, it reads back.
    again, _ = split_arguments(f"{key}={search.text}" for key, search in searches.items())
    assert again == searches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quant.bits=3,4"], "quant.bits=3: must be 2, 4, 8, 16 or 32"),
        (["optim.learning=0.1..0.2"], "optim.learning: unknown key; known here: name, lr"),
        (["model.dropout=0..1"], "model.dropout=1: must be less than 1"),
        (["optim.lr=0..1"], "optim.lr=0: must be greater than 0"),
        (["optim.lr=log:0..1"], "log: needs numbers above 0"),
        (["optim.lr=1e-1..1e-3"], "the range is empty; write the smaller number first"),
        (["optim.lr=log:1e-3"], "log: stands before a range"),
        (["quant.bits=4,,8"], "a choice is empty"),
        (["quant.bits=4,4"], "a choice is given twice"),
        (["optim.name=0..1"], "optim.name=0: must be"),
        (["train.seed=0..9"], "train.seed=0..9: is not searched, as the best of several seeds"),
        (["tracking.enabled=true,false"], "is not searched"),
        (["data.path=a,b"], "compared on the same validation rows"),
        (["quant.bits=4"], "nothing to search: give a range"),
        (["optim.lr=.1,.2", "optim.lr=.1"], "is fixed as well"),
        (["optim.lr=.1,.2", "optim.lr=.1...2"], "optim.lr is given twice"),
        (["optim.lr=0..1", "quant.bits=3,4"], "2 faults in what is searched"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    def check():
        searches, fixed = split_arguments(arguments)
        check_space(searches, None, fixed)

    with pytest.raises(ConfigError) as refusal:
        check()
    assert message in str(refusal.value)
