"""Fine-tuning of a tiny BERT made here: learning, kills, chains, what is written."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from killing import kill_once_written
from safetensors.torch import load_file

from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline

PIPELINE = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2, enabled: false}}
stages:
  - stage: finetune
    model: {model}
    data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz, test: {text}/dev.tsv.gz}}
    lr: 3e-3
    epochs: 4
    batch_size: 16
    precision: fp32
  - stage: report
"""


@pytest.fixture
def file(tiny_bert, sentence_files):
    path = Path("tiny.yaml")
    path.write_text(PIPELINE.format(model=tiny_bert, text=sentence_files))
    return path


def weights(name):
    return load_file(f"runs/{name}/stages/finetune/model/model.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_learns_and_a_killed_stage_comes_to_the_same_weights(file, sentence_files, dqrm):
    kill_once_written(
        "runs/killed/work/*/scratch/step-0000002*",
        *("pipeline", "run", str(file), "stages.finetune.save_minutes=1e-6", "name=killed"),
    )
    assert not Path("runs/killed/stages").exists()
    resumed = dqrm("pipeline", "run", file, "stages.finetune.save_minutes=9", "name=killed")
    assert resumed.exit_code == 0, resumed.stderr
    assert "going on at step" in resumed.stderr

    unbroken = run_pipeline(load_pipeline(file))
    assert_same(weights("killed"), weights("tiny"))

    metrics = unbroken.stages[0].record.metrics
    assert metrics["best/val_accuracy"] > 0.9
    assert metrics["test/accuracy"] == metrics["best/val_accuracy"]
    folder = unbroken.stages[0].folder / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    table = pd.read_csv(sentence_files / "dev.tsv.gz", sep="\t")
    batch = tokenizer(table.sentence.tolist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**batch).logits.argmax(1).numpy()
    assert (chosen == table.label).mean() == metrics["test/accuracy"]
    assert model.config.id2label == {0: "0", 1: "1"}

    (row,) = json.loads(Path("runs/tiny/stages/report/report.json").read_text())["models"]
    assert row["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_signal_saves_and_the_seed_decides(file):
    config = load_pipeline(file, ["stages.finetune.epochs=1", "name=whole"])
    run_pipeline(config)
    calls = 0

    def press_ctrl_c(phase, done, total, unit):
        nonlocal calls
        calls += 1
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    halves = load_pipeline(file, ["stages.finetune.epochs=1", "name=halves"])
    stopped = run_pipeline(halves, progress=press_ctrl_c)
    assert stopped.interrupted == signal.SIGINT
    assert calls == 7
    assert stopped.stages == []
    assert run_pipeline(halves).interrupted is None
    assert_same(weights("whole"), weights("halves"))

    run_pipeline(load_pipeline(file, ["stages.finetune.epochs=1", "stages.finetune.seed=1"]))
    other = weights("tiny")
    assert not torch.equal(other["classifier.weight"], weights("whole")["classifier.weight"])


def test_pairs_a_regression_and_a_chain(tiny_bert, recorded_runs):
    rng = np.random.default_rng(3)
    score = rng.uniform(0, 5, 96).round(2)
    first = [" ".join(f"w{n}" for n in rng.integers(0, 35, 5)) for _ in score]
    frame = pd.DataFrame({"sentence1": first, "sentence2": first, "score": score})
    frame.to_parquet("pairs.parquet")
    frame.assign(score=(score > 2).astype(int)).to_csv("classes.csv", index=False)
    Path("chain.yaml").write_text(
        "tracking: {system_metrics: false, flush_seconds: 0.2}\nstages:\n"
        f"  - {{stage: finetune, name: scores, model: {tiny_bert}, epochs: 1,\n"
        "     data: {train: pairs.parquet}, freeze_embeddings: true, precision: bf16}\n"
        "  - {stage: finetune, name: classes, model: 'stage:scores', epochs: 1,\n"
        "     data: {train: classes.csv}, select_by: f1}\n"
        "  - {stage: report, compare: scores}\n"
    )
    result = run_pipeline(load_pipeline(Path("chain.yaml")))
    scores, classes, report = result.stages
    assert {"best/val_pearson", "best/val_spearman"} <= scores.record.metrics.keys()
    assert "best/val_f1" in classes.record.metrics
    before = load_file(tiny_bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    kept = load_file(scores.folder / "model" / "model.safetensors")
    assert torch.equal(kept["bert.embeddings.word_embeddings.weight"], before)
    config = json.loads((scores.folder / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    text = (report.folder / "report.txt").read_text()
    assert "scores" in text
    assert "1.00 x" in text

    parent, children = recorded_runs()
    assert set(children) == {"scores", "classes", "report"}
    assert children["classes"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert children["classes"].data.params["select_by"] == "f1"
    assert "val/f1" in children["classes"].data.metrics


def test_batches_hold_every_row_once_and_hardly_any_padding(tiny_bert, sentence_files):
    from dqrm.pipelines.text.batches import EncodedText
    from dqrm.pipelines.text.classifier import load_tokenizer
    from dqrm.pipelines.text.tables import find_columns, read_table, take_examples

    table = read_table(sentence_files / "train.tsv")
    examples = take_examples(table, find_columns(table, "t"), "t")
    text = EncodedText(load_tokenizer(tiny_bert), examples, 64)
    batches = text.shuffled(16, 0, 0)
    assert sorted(row for rows in batches for row in rows) == list(range(len(text)))
    assert text.shuffled(16, 0, 0) == batches
    assert text.shuffled(16, 0, 1) != batches
    assert text.shuffled(16, 1, 0) != batches
    cells = sum(text.batch(rows)["input_ids"].numel() for rows in batches)
    assert cells < 1.6 * sum(text.lengths)
    first = text.batch(batches[0])
    for position, row in enumerate(batches[0]):
        assert int(first["attention_mask"][position].sum()) == text.lengths[row]
    cut = EncodedText(load_tokenizer(tiny_bert), examples, 6)
    assert max(cut.lengths) == 6


def test_faults_show_before_anything_runs(file, dqrm, sentence_files):
    for override, message in (
        ("stages.finetune.model=absent", "tiny.yaml:5: stages.finetune.model: absent: no such"),
        ("stages.finetune.model=package:no_such_package", "no such package is installed"),
        ("stages.finetune.model=stage:prune", "no earlier stage is called so"),
        (f"stages.finetune.model={sentence_files}", "it has no config.json"),
        ("stages.finetune.data.train=absent.tsv", "stages.finetune.data.train: absent.tsv: no"),
        ("stages.finetune.data.label=stars", "no column 'stars'; there are: sentence, label"),
        ("stages.finetune.learning_rate=1", "stages.finetune.learning_rate: unknown key"),
        (
            "stages.finetune.select_by=pearson",
            "tiny.yaml:4: stages.finetune.select_by: select_by=pearson: 2 classes can take "
            "accuracy, matthews, f1",
        ),
        ("stages.finetune.task=regression", None),
    ):
        done = dqrm("pipeline", "validate", file, override)
        assert done.exit_code == (0 if message is None else 2), override
        assert message is None or message in done.stderr
    scores = "stages.finetune.task=regression"
    wrong = dqrm("pipeline", "validate", file, scores, "stages.finetune.select_by=f1")
    assert "select_by=f1: a regression can take pearson, spearman" in wrong.stderr
    plan = dqrm("pipeline", "run", file, "--dry-run", "name=planned")
    assert "steps           80" in plan.stdout
    assert "task            classification, 2 classes (0, 1)" in plan.stdout
    scores = dqrm("pipeline", "run", file, "--dry-run", "name=planned", scores)
    assert "task            regression\n" in scores.stdout
    assert "parameters" in plan.stdout
    assert not Path("runs/planned").exists()


def test_labels_that_cannot_be_learned_show_before_anything_runs(file, dqrm):
    rows = [f"w{n}\t{n % 2}" for n in range(300)]

    def write(name, *more):
        Path(name).write_text("\n".join(["sentence\tlabel", *rows, *more]) + "\n")

    write("two.tsv")
    write("three.tsv", "w1\t2")
    write("word.tsv", "w1\tnone")
    Path("one.tsv").write_text("sentence\tlabel\n" + "w1\t1\n" * 300)
    data = "stages.finetune.data"
    for split, name, message in (
        ("train", "one.tsv", "has one class only, 1"),
        ("train", "word.tsv", "row 301: label 'none' is no finite number; correct it, take the"),
        ("dev", "three.tsv", "row 301: label '2' is not in the training data, which has 0, 1"),
        ("test", "three.tsv", "row 301: label '2' is not in the training data, which has 0, 1"),
    ):
        given = {"train": "two.tsv", "dev": "two.tsv", "test": "two.tsv", split: name}
        overrides = [f"{data}.{key}={value}" for key, value in given.items()]
        done = dqrm("pipeline", "validate", file, *overrides)
        assert done.exit_code == 2, name
        assert f"tiny.yaml:6: {data}.{split}: {name}: {message}" in done.stderr
        assert "faults" not in done.stderr
        # What was read before is not held against other rows.
        write(name)
        assert dqrm("pipeline", "validate", file, *overrides).exit_code == 0
        write("three.tsv", "w1\t2")


def test_a_head_of_another_size_is_made_anew_and_told(tiny_bert, sentence_files, caplog):
    Path("heads.yaml").write_text(
        "tracking: {enabled: false}\nthreads: 1\n"
        f"data: {{train: {sentence_files}/train.tsv}}\n"
        "stages:\n"
        f"  - {{stage: finetune, name: first, model: {tiny_bert}, max_steps: 1, "
        "task: regression}\n"
        "  - {stage: finetune, name: second, model: 'stage:first', max_steps: 1}\n"
        "  - {stage: finetune, name: third, model: 'stage:second', max_steps: 1}\n"
    )
    with caplog.at_level("INFO", logger="dqrm"):
        run_pipeline(load_pipeline(Path("heads.yaml")))
    told = [r.message for r in caplog.records if r.name.endswith("text_training")]
    two = "classification, 2 classes (0, 1)"
    assert told == [
        "regression",
        f"{tiny_bert} has no head; it gets a new one of width 1",
        two,
        "the head of stage:first has width 1; it gets a new one of width 2",
        two,
    ]


def test_wrong_labels_name_file_and_row_before_training(tiny_bert, dqrm):
    frame = pd.DataFrame({"sentence": [f"w{n}" for n in range(20)], "label": 0.5})
    frame.loc[::2, "label"] = 1.5
    for name in ("train", "dev", "test"):
        frame.to_csv(f"{name}.tsv", sep="\t", index=False)
    Path("r.yaml").write_text(
        "tracking: {enabled: false}\n"
        "data: {train: train.tsv, dev: dev.tsv, test: test.tsv}\n"
        f"stages: [{{stage: finetune, model: {tiny_bert}}}]\n"
    )
    for name, label in (("train", "inf"), ("dev", "inf"), ("test", "foo")):
        wrong = frame.astype({"label": object})
        wrong.loc[6, "label"] = label
        wrong.to_csv(f"{name}.tsv", sep="\t", index=False)
        done = dqrm("pipeline", "run", "r.yaml")
        assert done.exit_code == 2, name
        message = f"stages.finetune.data.{name}: {name}.tsv: row 7: label '{label}' is no finite"
        assert message in done.stderr
        assert "step" not in done.stderr
        frame.to_csv(f"{name}.tsv", sep="\t", index=False)


def test_without_transformers_it_says_what_to_install(file, dqrm, monkeypatch):
    from dqrm.pipelines.text import library

    find_spec = library.util.find_spec
    monkeypatch.setattr(
        library.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name)
    )
    done = dqrm("pipeline", "validate", file)
    assert done.exit_code == 2
    assert "pip install 'dqrm[transformers]'" in done.stderr


def test_a_model_without_words_is_refused(file, dqrm, tiny_bert):
    from dqrm.pipelines.text.classifier import load_tokenizer

    shutil.copytree(tiny_bert, "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        Path("bare", name).unlink()
    done = dqrm("pipeline", "run", file, "stages.finetune.model=bare")
    assert done.exit_code == 2
    assert "tiny.yaml:5: stages.finetune.model: bare: holds no tokenizer" in done.stderr
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    transformers.BertTokenizerFast(vocab=words).save_pretrained("bare")
    with pytest.raises(ValueError, match="bare: holds no tokenizer, or one without words"):
        load_tokenizer(Path("bare"))
    Path("bare/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="bare: no tokenizer can be read"):
        load_tokenizer(Path("bare"))
