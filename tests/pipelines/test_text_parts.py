"""Tables, metrics and batches of sentences."""

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from sklearn import metrics as sklearn

from dqrm.pipelines.stages.text_data import TextData
from dqrm.pipelines.text.quality import measure_text
from dqrm.pipelines.text.tables import (
    Labels,
    find_columns,
    read_table,
    split_examples,
    take_examples,
)


def test_metrics_agree_with_sklearn_and_pandas():
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        labels = torch.tensor(rng.integers(0, classes, 300))
        logits = torch.tensor(rng.normal(size=(300, classes))).float()
        logits[torch.arange(300), labels] += 1
        measured = measure_text(logits, labels, classes)
        chosen = logits.argmax(1)
        assert measured["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, chosen))
        expected = sklearn.matthews_corrcoef(labels, chosen)
        assert measured["matthews"] == pytest.approx(expected)
        if classes == 2:
            assert measured["f1"] == pytest.approx(sklearn.f1_score(labels, chosen))
        else:
            assert "f1" not in measured
        probabilities = logits.softmax(1)
        assert measured["loss"] == pytest.approx(sklearn.log_loss(labels, probabilities), rel=1e-5)
    scores = torch.tensor(rng.integers(0, 6, 200)).float()
    guess = scores + torch.tensor(rng.normal(size=200)).float()
    measured = measure_text(guess[:, None], scores, None)
    frame = pd.DataFrame({"a": guess.numpy(), "b": scores.numpy()}).astype(float)
    assert measured["pearson"] == pytest.approx(frame.corr().loc["a", "b"])
    assert measured["spearman"] == pytest.approx(frame.corr("spearman").loc["a", "b"])
    assert np.isnan(measure_text(torch.ones(5, 1), scores[:5], None)["pearson"])


def test_the_same_rows_from_every_format():
    frame = pd.DataFrame({"text": ['say "no', "NA", "a, b"], "label": [1, 0, 1]})
    plain = 'text\tlabel\nsay "no\t1\nNA\t0\na, b\t1\n'
    Path("a.tsv").write_text(plain)
    Path("b.tsv.gz").write_bytes(gzip.compress(plain.encode()))
    frame.to_csv("c.csv", index=False)
    frame.to_parquet("d.parquet")
    for name in ("a.tsv", "b.tsv.gz", "c.csv", "d.parquet"):
        table = read_table(Path(name))
        examples = take_examples(table, find_columns(table, name), name)
        assert examples.text == frame.text.tolist(), name
        assert examples.labels.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="cannot tell its format"):
        read_table(Path("d.txt"))
    with pytest.raises(ValueError, match=r"d\.parquet: not a csv table"):
        read_table(Path("d.parquet"), "csv")


@pytest.mark.parametrize(("ending", "separator"), [("tsv", "\t"), ("csv", ",")])
def test_rows_longer_than_the_header_shift_no_columns(ending, separator):
    path = Path(f"long.{ending}")

    def write(*rows):
        path.write_text("".join(separator.join(row) + "\n" for row in rows))

    header, row = ("sentence", "label"), ("a b", "1")
    for more in (1, 2):
        write(header, *[(*row, *"xy"[:more])] * 3)
        message = rf"long\.{ending}: .* row 1, .* has {2 + more} fields and the header 2"
        with pytest.raises(ValueError, match=message):
            read_table(path)
        with pytest.raises(ValueError, match=message):
            read_table(path, rows=1)
    write(header, row, row, (*row, "x"), row)
    with pytest.raises(ValueError, match=rf"long\.{ending}: .* 2 fields in line 4, saw 3"):
        read_table(path)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_is_read_whole_or_named(ending):
    pack = {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstandard}[ending].compress
    rows = "".join(f"some text {n * n}\t{n % 2}\n" for n in range(5000))
    packed = pack(f"text\tlabel\n{rows}".encode())
    path = Path(f"rows.tsv.{ending}")
    path.write_bytes(packed + pack(b"more\t2\n"))
    table = read_table(path)
    assert len(table) == 5001, "files of two streams, one behind the other"
    assert table.text.iloc[-1] == "more"
    for content in (packed[:2000], packed[:200] + b"\xff" * 99 + packed[300:], b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"rows\.tsv\.{ending}: .*; copy it again"):
            read_table(path)


def test_rows_without_a_text_or_with_lists_are_named():
    def problems(**columns):
        pd.DataFrame({"sentence": ["a", ""], "label": [0, 1]} | columns).to_parquet("t.parquet")
        data = TextData(train=Path("t.parquet"), dev_fraction=0.5)
        return [(problem.field, problem.message) for problem in data.problems()]

    assert problems() == []
    for columns, message in (
        ({"sentence": ["a", None]}, "row 2 has no sentence; add it, or take the row out"),
        ({"sentence": [["a"], ["b"]]}, "row 1: sentence array(['a'], dtype=object) is no text"),
        ({"sentence": [b"a", b"b"]}, "row 1: sentence b'a' is no text"),
        ({"label": [[0], [1]]}, "row 1: label array([0]) is not a single value"),
        ({"label": [0.0, None]}, "row 2 has no label; add it, or take the row out"),
        ({"sentence": [], "label": []}, "has no rows"),
    ):
        assert problems(**columns) == [("data.train", f"t.parquet: {message}")], columns


def test_too_few_rows_to_set_apart_are_a_problem_of_the_data():
    def problems(rows, **fractions):
        Path("t.tsv").write_text("text\tlabel\n" + "a\t1\n" * rows)
        return [p.message for p in TextData(train=Path("t.tsv"), **fractions).problems()]

    assert problems(0) == ["t.tsv: has no rows"]
    message = "0.001 of 300 rows cannot be set apart; change data.dev_fraction, or give data.dev"
    assert problems(300, dev_fraction=0.001) == [f"t.tsv: {message}"]
    assert problems(600, dev_fraction=0.001) == []
    assert "give data.test" in problems(300, test_fraction=0.001)[0]


def test_texts_are_read_as_they_are_written():
    rows = ["00001", "1.50", "1e5", "", "nan", "True"]
    for ending, separator in (("tsv", "\t"), ("csv", ",")):
        for text, pair, given in (
            ("sentence", None, {}),
            ("sentence1", "sentence2", {}),
            ("premise", "hypothesis", {}),
            ("review", None, {"text": "review"}),
            ("text", "second", {"text_pair": "second"}),
        ):
            header = [text, *([] if pair is None else [pair]), "label"]
            for number, row in enumerate(rows):
                path = Path(f"{number}.{ending}")
                cells = [[row] * (len(header) - 1) + [str(label)] for label in (0, 1)]
                path.write_text("".join(separator.join(c) + "\n" for c in (header, *cells)))
                train, dev, _ = TextData(train=path, dev_fraction=0.5, **given).read()
                assert train.text + dev.text == [row, row]
                if pair is not None:
                    assert train.text_pair + dev.text_pair == [row, row]
                labels = pd.concat([train.labels, dev.labels])
                assert sorted(labels.tolist()) == [0, 1], "labels are numbers where they are"
    Path("odd.csv").write_text("sentence,text\na,1\nb,2.0\n")
    odd = TextData(train=Path("odd.csv"), dev_fraction=0.5, label="text")
    train, dev, _ = odd.read()
    assert {train.labels.dtype, dev.labels.dtype} == {np.dtype("float64")}


def test_splits_have_the_same_columns():
    pairs, single = "sentence1\tsentence2\tlabel\na\tb\t1\n", "sentence\tlabel\na\t0\n"
    Path("pairs.tsv").write_text(pairs)
    Path("single.tsv").write_text(single)
    Path("both.tsv").write_text("sentence1\tsentence2\tsentence\tlabel\na\tb\tc\t1\n")
    for split in ("dev", "test"):
        files = {"dev": "pairs.tsv", "test": "pairs.tsv", split: "single.tsv"}
        data = TextData(train=Path("pairs.tsv"), **files)
        (problem,) = data.problems()
        assert problem.field == f"data.{split}"
        assert problem.message.startswith(
            "single.tsv: text in sentence, label in label; "
            "pairs.tsv: text in sentence1 and sentence2, label in label; name the texts alike"
        )
        with pytest.raises(ValueError, match=r"^single\.tsv: .*pairs\.tsv: text in sentence1 and"):
            data.read()
    assert TextData(train=Path("pairs.tsv"), dev=Path("both.tsv")).problems() == []
    mixed = {"train": Path("both.tsv"), "dev": Path("single.tsv")}
    assert len(TextData(**mixed).problems()) == 1
    assert TextData(**mixed, text="sentence").read()[1].text == ["a"]
    Path("scores.tsv").write_text("sentence\tscore\na\t1\n")
    assert TextData(train=Path("single.tsv"), dev=Path("scores.tsv")).read()[1].labels[0] == 1


def test_labels_of_several_types_are_told():
    with pytest.raises(ValueError, match="t: labels are of several types"):
        Labels.of(pd.Series([1, "no", b"x"], dtype=object), "classification", "t")


def test_many_or_long_classes_are_not_all_told():
    labels = Labels.of(pd.Series([f"{n:02}{'x' * 90}" for n in range(30)]), "auto", "t")
    with pytest.raises(ValueError, match="and 25 others") as told:
        labels.encode(pd.Series(["y" * 500]), "dev")
    assert len(str(told.value)) < 400
    assert str(Labels(("no", "yes"))) == "classification, 2 classes (no, yes)"
    assert str(labels).endswith("and 25 others)")
    assert str(Labels(None)) == "regression"


def test_columns_and_labels():
    pairs = pd.DataFrame({"sentence1": ["a"], "sentence2": ["b"], "score": [2.5]})
    found = find_columns(pairs, "t")
    assert (found.text, found.text_pair, found.label) == ("sentence1", "sentence2", "score")
    with pytest.raises(ValueError, match="t: no column 'x'; there are: sentence1"):
        find_columns(pairs, "t", text="x")
    with pytest.raises(ValueError, match="which column is the label"):
        find_columns(pairs[["sentence1", "sentence2"]], "t")
    assert Labels.of(pairs.score, "auto", "t").classes is None
    numbers = Labels.of(pd.Series([0, 1, 10, 2]), "auto", "t")
    assert numbers.classes == ("0", "1", "2", "10")
    assert numbers.encode(pd.Series([10.0, 0.0]), "dev").tolist() == [3, 0]
    assert Labels.of(pd.Series([0, 1]), "regression", "t").classes is None
    words = Labels.of(pd.Series(["yes", "no"]), "auto", "t")
    assert words.ordered_as(["Yes", "No"]).classes == ("yes", "no")
    for other in (["LABEL_0", "LABEL_1"], ["yes", "no", "maybe"], ["yes", "yes"]):
        assert words.ordered_as(other) == words
    assert Labels(("no", "No")).ordered_as(["No", "no"]).classes == ("No", "no")
    assert Labels(None).ordered_as(["LABEL_0"]) == Labels(None)
    assert words.classes == ("no", "yes")
    with pytest.raises(ValueError, match="dev: row 1: label 'maybe' is not in the training"):
        words.encode(pd.Series(["maybe"]), "dev")
    with pytest.raises(ValueError, match="one class only"):
        Labels.of(pd.Series([1, 1]), "classification", "t")
    missing = pd.DataFrame({"text": ["a", "b"], "label": [1.0, None]})
    with pytest.raises(ValueError, match="row 2 has no label"):
        take_examples(missing, find_columns(missing, "t"), "t")


def test_labels_that_are_no_numbers_among_numbers():
    ratings = pd.Series(["1.0", "2.5", "n/a", "4.0"])
    message = r"t: row 3: label 'n/a' is no finite number; .* set task: classification"
    with pytest.raises(ValueError, match=message):
        Labels.of(ratings, "auto", "t")
    assert Labels.of(ratings, "classification", "t").num_outputs == 4
    assert Labels.of(pd.Series(["1", "n/a", "none"]), "auto", "t").num_outputs == 3
    assert Labels.of(pd.Series(["1.0", "2.5"]), "auto", "t").classes is None
    for number, label in ((1, "nan"), (2, np.inf), (3, "1e39"), (4, "")):
        values = pd.Series([1.5] * 5, dtype=object)
        values[number - 1] = label
        message = f"t: row {number}: label '{label}' is no finite number; correct it, or take"
        with pytest.raises(ValueError, match=message):
            Labels.of(values, "regression", "t")
        # Rows keep their number in the file when some are drawn.
        with pytest.raises(ValueError, match=message):
            Labels(None).encode(values.iloc[[4, number - 1]], "t")
    with pytest.raises(ValueError, match="row 2: label 'inf' is no finite number"):
        Labels.of(pd.Series([1.0, np.inf, np.inf]), "auto", "t")
    assert Labels(None).encode(pd.Series(["1", "2.5"]), "t").tolist() == [1.0, 2.5]


def test_a_label_is_the_same_class_in_every_part_of_a_long_file():
    Path("long.tsv").write_text("text\tlabel\n" + "a\t1.0\n" * 300_000 + "b\tno\n")
    labels = read_table(Path("long.tsv")).label
    assert Labels.of(labels, "classification", "t").classes == ("1.0", "no")


def test_rows_set_apart_are_the_same_every_time():
    frame = pd.DataFrame({"text": [f"t{n}" for n in range(50)], "label": range(50)})
    examples = take_examples(frame, find_columns(frame, "t"), "t")
    train, dev = split_examples(examples, 0.1, "t", "data.dev")
    assert len(dev) == 5
    assert sorted([*train.text, *dev.text]) == sorted(frame.text)
    assert split_examples(examples, 0.1, "t", "data.dev")[1].text == dev.text
    assert [f"t{label}" for label in dev.labels] == dev.text
    with pytest.raises(ValueError, match=r"give data\.dev"):
        split_examples(examples, 0.001, "t", "data.dev")


def test_rows_to_test_on_are_drawn_before_those_to_select_on():
    frame = pd.DataFrame({"text": [f"t{n}" for n in range(100)], "label": [0, 1] * 50})
    frame.to_csv("all.csv", index=False)
    data = TextData(train=Path("all.csv"), test_fraction=0.2, dev_fraction=0.1)
    train, dev, test = data.read()
    assert (len(train), len(dev), len(test)) == (72, 8, 20)
    assert sorted([*train.text, *dev.text, *test.text]) == sorted(frame.text)
    assert data.read()[2].text == test.text
    smaller = TextData(train=Path("all.csv"), test_fraction=0.2, dev_fraction=0.5)
    assert smaller.read()[2].text == test.text
    assert "test_fraction" in data.model_dump()
    assert "test_fraction" not in TextData(train=Path("all.csv")).model_dump()
    with pytest.raises(ValueError, match=r"all\.csv: 0\.001 of 100 rows .* give data\.test"):
        TextData(train=Path("all.csv"), test_fraction=0.001).read()
    with pytest.raises(ValueError, match="set test or test_fraction"):
        TextData(train=Path("all.csv"), test=Path("all.csv"), test_fraction=0.1)
