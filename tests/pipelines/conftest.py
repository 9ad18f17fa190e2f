"""A clean folder and environment for every pipeline."""

import sys
from pathlib import Path

import pytest
from command_line import clean_environment, log_as_before, run_dqrm


@pytest.fixture(autouse=True)
def a_clean_environment(monkeypatch, tmp_path):
    """An empty current folder, no variables that steer MLflow, and the process left as it was."""
    clean_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with log_as_before():
        yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def dqrm():
    """Run a command line in this process."""
    return run_dqrm


@pytest.fixture
def recorded_runs():
    """Read the default store: the pipeline's run, and those of its stages by name."""

    def read():
        from dqrm.tracking.quiet import import_mlflow

        # An absolute path: MLflow keeps stores open by their address.
        client = import_mlflow().MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
        (experiment,) = (e for e in client.search_experiments() if e.name == "dqrm")
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = (run for run in runs if "stage" not in run.data.tags)
        return parent, {r.data.tags["stage"]: r for r in runs if "stage" in r.data.tags}

    return read


def make_bert(folder, layers):
    """A BERT with random weights and a vocabulary of 40 words, made here."""
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a BERT of 2 layers."""
    return make_bert(tmp_path_factory.mktemp("models") / "tiny", 2)


@pytest.fixture(scope="session")
def bert_of_six(tmp_path_factory):
    """Folder of a BERT of 6 layers, as the shipped recipes take one."""
    return make_bert(tmp_path_factory.mktemp("models") / "six", 6)


def sentences(rows, seed):
    """Sentences of 3 to 20 words; the label says whether one of five words is among them."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    drawn = [rng.integers(5, 35, rng.integers(3, 21)) for _ in range(rows)]
    labels = rng.integers(0, 2, rows)
    for words, label in zip(drawn, labels, strict=True):
        if label:
            words[rng.integers(len(words))] = rng.integers(0, 5)
    texts = [" ".join(f"w{word}" for word in words) for words in drawn]
    return pd.DataFrame({"sentence": texts, "label": labels})


@pytest.fixture(scope="session")
def sentence_files(tmp_path_factory):
    """Folder with train.tsv (320 rows) and dev.tsv.gz (160)."""
    folder = tmp_path_factory.mktemp("text")
    sentences(320, 1).to_csv(folder / "train.tsv", sep="\t", index=False)
    sentences(160, 2).to_csv(folder / "dev.tsv.gz", sep="\t", index=False)
    return folder


DAILY = """\
threads: 1
tracking: {{system_metrics: false, flush_seconds: 0.2}}
stages:
  - stage: prepare
    train: [{train}]
    test: [{test}]
    base: models:/clicks@champion
    settings: {{format: parquet, min_frequency: 2, workers: 1}}
  - stage: train
    data: stage:prepare
    warm_start: models:/clicks@champion
    settings:
      model: {{embedding_dim: 8, bottom_mlp: [16], top_mlp: [16]}}
      quant: {{bits: 4, granularity: row}}
      optim: {{name: adagrad, lr: 0.02}}
      data: {{batch_size: 128}}
      checkpoint: {{every_steps: 4}}
  - stage: promote
    candidate: stage:train
    data: stage:prepare
    model: clicks
    min_auc: 0.55
    auc_margin: 0.03
"""


@pytest.fixture
def daily_file():
    """Write daily.yaml, a small model retrained by day; returns its path."""

    def write(train, test):
        file = Path("daily.yaml")
        file.write_text(DAILY.format(train=train, test=test))
        return file

    return write
