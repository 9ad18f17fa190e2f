"""Models that a text stage is given: whole ones, and ones that lack a part."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqrm.compress.lower.hf import load_lowered
from dqrm.pipelines.text.classifier import load_any, load_classifier, load_teacher
from dqrm.pipelines.text.tables import Labels

TWO = Labels(("0", "1"))


@pytest.fixture
def copy_of(tiny_bert):
    """Copy the headless model, with other tensors; returns its folder."""

    def copy(name, edit):
        folder = Path(shutil.copytree(tiny_bert, name))
        tensors = edit(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_encoders_that_are_not_whole_are_refused(copy_of):
    part = copy_of("part", lambda all_: {k: v for k, v in all_.items() if "layer.1." not in k})
    alien = copy_of("alien", lambda all_: {f"foo.{k}": v for k, v in all_.items()})
    name = "encoder.layer.0.output.dense.weight"
    other = copy_of("other", lambda all_: {**all_, name: all_[name][:, :8].contiguous()})
    for folder, message in (
        (part, r"16 missing or .*: (bert\.)?encoder.layer.1.attention.*, \.\.\."),
        (alien, r"3[79] missing"),
        (other, rf"1 missing or of another shape: (bert\.)?{name}$"),
    ):
        for load in (load_any, lambda folder: load_classifier(folder, TWO, 0)):
            with pytest.raises(ValueError, match=f"^{folder}: .*{message}"):
                load(folder)


def test_heads_and_poolers_are_made_anew_but_not_for_a_teacher(copy_of):
    folder = copy_of("bare", lambda all_: {k: v for k, v in all_.items() if "pooler" not in k})
    load_any(folder)
    model = load_classifier(folder, TWO, 0)
    model.save_pretrained("two")
    three = load_classifier(Path("two"), Labels(("a", "b", "c")), 0)
    assert three.classifier.out_features == 3
    torch.testing.assert_close(three.bert.state_dict(), model.bert.state_dict())
    load_teacher(Path("two"), TWO)

    tensors = load_file("two/model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, "two/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing .*: classifier\.weight$"):
        load_teacher(Path("two"), TWO)


def test_damaged_weights_are_named(tiny_bert, sentence_files, dqrm):
    file = Path(shutil.copytree(tiny_bert, "cut")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for load in (load_any, load_lowered, lambda folder: load_classifier(folder, TWO, 0)):
        with pytest.raises(ValueError, match=f"^cut: .*{file} is damaged"):
            load(Path("cut"))
    done = dqrm("profile", "cut")
    assert done.exit_code == 2
    assert f"{file} is damaged" in done.stderr
    Path("cut.yaml").write_text(
        "tracking: {enabled: false}\nstages:\n"
        f"  - {{stage: finetune, model: cut, data: {{train: {sentence_files}/train.tsv}}}}\n"
    )
    done = dqrm("pipeline", "run", "cut.yaml")
    assert done.exit_code == 2
    assert f"{file} is damaged" in done.stderr
