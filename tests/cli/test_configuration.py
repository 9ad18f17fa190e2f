"""Defaults, file, overrides; and every fault with its place."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from dqrm.config import RunConfig
from dqrm.configuration import (
    ConfigError,
    describe_fields,
    load,
    parse_override,
    shipped_configs,
    shipped_text,
    to_yaml,
)
from dqrm.settings import Settings


class Early(Settings):
    """Splits by row number."""

    by: Literal["early"] = "early"
    """Kind."""

    rows: int = 10
    """Rows taken."""


class Late(Settings):
    """Splits by time."""

    by: Literal["late"] = "late"
    """Kind."""

    start: str = ""
    """First moment."""


class Column(Settings):
    """A column."""

    name: str
    """Its name."""


class Example(Settings):
    """Shapes that RunConfig does not have."""

    title: str
    """A required text."""

    columns: tuple[Column, ...] = ()
    """Sections in a list."""

    split: Early | Late = Field(default=Early(), discriminator="by")
    """One of two sections."""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(*overrides: str, source: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, source, overrides)
    lines = str(caught.value).splitlines()
    return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(tmp_path, "quant: {bits: 8}\noptim:\n  lr: 0.5\n  eps: 1e-6\n")
    config = load(RunConfig, path, ["optim.lr=1e-3", "optim.lr=2e-3"])
    assert config.quant.bits == 8
    assert config.optim.lr == 2e-3
    assert config.optim.eps == 1e-6  # PyYAML alone reads 1e-6 as text
    assert config.model == RunConfig().model


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=.5", 0.5),
        ("optim.lr=1E+2", 100.0),
        ("optim.lr=1", 1.0),
        ("data.window_rows=1e6", 1_000_000),
        ("data.window_rows=1_000", 1000),
        ("train.seed=010", 10),
        ("data.shuffle=off", False),
        ("data.shuffle=true", True),
        ("train.threads=null", None),
        ("train.threads=", None),
        ("model.bottom_mlp=[64, 32]", (64, 32)),
        ("model.bottom_mlp=[]", ()),
        ("name=2024", "2024"),
        ("name=1e-3", "1e-3"),
        ("name=true", "true"),
        ("name=2019-11-24", "2019-11-24"),
        ("output=/tmp/x", Path("/tmp/x")),
        ("output=7", Path("7")),
        ("data.path=a=b", "a=b"),
        ("tracking.tags={team: ads, year: '2024'}", {"team": "ads", "year": "2024"}),
        ("tracking.tags.year=2024", {"year": "2024"}),
        ("quant.table_bits.C3=8", {"C3": 8}),
    ],
)
def test_override_values(override: str, value: object) -> None:
    config: object = load(RunConfig, None, [override])
    for part in override.partition("=")[0].split("."):
        if isinstance(config, dict):
            break
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_dictionary_entries_are_merged_and_whole_values_replace(tmp_path: Path) -> None:
    path = write(tmp_path, "quant:\n  table_bits: {C1: 8, C2: 2}\n")
    merged = load(RunConfig, path, ["quant.table_bits.C3=16"])
    assert merged.quant.table_bits == {"C1": 8, "C2": 2, "C3": 16}
    replaced = load(RunConfig, path, ["quant.table_bits={C3: 16}"])
    assert replaced.quant.table_bits == {"C3": 16}


def test_punctuation_is_a_value() -> None:
    assert parse_override("delimiter=|").value == "|"
    assert parse_override("delimiter=\t").value == "\t"


def test_all_faults_at_once_with_path_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, "quant:\n  bits: 3\n\nmodel:\n  bottom_mlp: [1, wide]\n")
    found = faults("optim.lr=fast", "train.epochs=0", "quant.ste=clop", source=path)
    assert sorted(found) == sorted(
        [
            f"{path}:2: quant.bits=3: must be 2, 4, 8, 16 or 32",
            f"{path}:5: model.bottom_mlp.1=wide: must be a whole number",
            "optim.lr=fast: must be a number",
            "train.epochs=0: must be greater than 0",
            "quant.ste=clop: must be 'pass' or 'clip'",
        ]
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("quant.bitz=4", "did you mean quant.bits?"),
        ("lr=0.1", "did you mean optim.lr?"),
        ("data.batchsize=1", "did you mean data.batch_size?"),
        ("quantization.bits=4", "did you mean quant?"),
        ("Train.epochs=4", "did you mean train?"),
        ("epoch=4", "did you mean train.epochs?"),
        ("checkpoint.zzz=4", "known here: every_steps, every_minutes, keep_last"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, hint: str) -> None:
    (fault,) = faults(override)
    assert ": unknown key; " in fault
    assert fault.endswith(hint)


def test_unknown_key_of_a_file_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "# comment\noptim:\n  learning_rate: 0.1\n")
    (fault,) = faults(source=path)
    assert fault.startswith(f"{path}:3: optim.learning_rate: unknown key; ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits", "'bits': expected key=value"),
        ("=4", "'=4': expected a dotted key"),
        ("quant..bits=4", "expected a dotted key"),
        ("quant.bits=[4", "not a YAML value"),
        ("name.first=x", "name: must be text, not a section"),
        ("quant=4", "quant=4: must be a section of keys"),
        ("quant.table_bits=4", "quant.table_bits=4: must be a section of keys"),
        ("model.top_mlp=512", "model.top_mlp=512: must be a list"),
        ("optim.lr=true", "optim.lr=true: must be a number"),
        ("train.epochs=true", "train.epochs=true: must be a number"),
        ("train.epochs=1.5", "train.epochs=1.5: must be a whole number"),
        ("optim.lr=.nan", "optim.lr"),
        ("data.shuffle=maybe", "data.shuffle=maybe: must be true or false"),
        ("train.precision=fp8", "train.precision=fp8: must be 'fp32', 'bf16' or 'int8'"),
        ("quant.table_bits.C3=5", "quant.table_bits.C3=5: must be 2, 4, 8, 16 or 32"),
    ],
)
def test_bad_override(override: str, message: str) -> None:
    (fault,) = faults(override)
    assert message in fault


def test_override_below_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\n")
    (fault,) = faults("name.first=y", source=path)
    assert fault == "name.first=y: name is x, not a section"


def test_contradiction_between_settings_names_the_section() -> None:
    (fault,) = faults("quant.granularity=row", "quant.scale_period=10")
    assert fault.startswith("quant: scale_period applies to granularity=table only")


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("quant:\n  bits: [4\noptim: 1\n", ":3:", "expected"),
        ("quant:\n\tbits: 4\n", ":2:1:", "spaces, not tabs"),
        ("a: 1\nb: 2\na: 3\n", ":3:1:", "'a' is given twice"),
        ("- 1\n- 2\n", ":1:1:", "found a list"),
        ("just text\n", ":1:1:", "found the single value"),
        ("a: &x [*x]\n", ":1:", "refers to itself"),
        ("a: !!python/object:os.system {}\n", ":1:", "constructor"),
        ("a: b\x07c\n", ":1:5:", "not allowed"),
        ("? [1, 2]\n: 3\n", ":1:3:", "plain text"),
    ],
    ids=["open-list", "tab", "twice", "list", "scalar", "loop", "object", "control", "list-key"],
)
def test_what_is_not_yaml_names_line_and_column(
    tmp_path: Path, text: str, place: str, problem: str
) -> None:
    path = write(tmp_path, text)
    (fault,) = faults(source=path)
    assert fault.startswith(f"{path}{place}")
    assert problem in fault


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml: no such configuration file"):
        load(RunConfig, tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="byte 6 is not UTF-8"):
        load(RunConfig, binary)
    with pytest.raises(ConfigError, match="is a folder"):
        load(RunConfig, tmp_path)
    empty = write(tmp_path, "# nothing\n")
    assert load(RunConfig, empty) == RunConfig()
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load(RunConfig, marked).name == "x"


def test_printed_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        RunConfig,
        None,
        [
            "name=1e-3",
            "data.path=no",
            "optim.eps=1e-10",
            "quant.table_bits.C3=8",
            "tracking.tags.when=2019-11-24",
            "tracking.tags.text='a: b # c'",
            "model.bottom_mlp=[]",
            "output=a b/c",
        ],
    )
    text = to_yaml(config)
    assert load(RunConfig, write(tmp_path, text)) == config
    # Each key stands under its help.
    assert "  # Learning rate after warm-up.\n  lr: 0.1\n" in text
    assert "# Fake quantization of embedding rows and MLP weights" in text


def test_sections_in_lists_and_sections_of_several_kinds(tmp_path: Path) -> None:
    config = load(Example, None, ["title=x", "split.rows=5", "columns=[{name: a}, {name: b}]"])
    assert config.split == Early(rows=5)
    assert [column.name for column in config.columns] == ["a", "b"]
    late = load(Example, None, ["title=x", "split.by=late", "split.start=2019-11-24"])
    assert late.split == Late(start="2019-11-24")
    for value in (config, late):
        assert load(Example, write(tmp_path, to_yaml(value))) == value
    with pytest.raises(ConfigError) as caught:
        load(Example, None, ["split.by=lat", "columns=[{nam: a}]", "split.rowz=1"])
    text = str(caught.value)
    assert "title: is required" in text
    assert "split.by=lat: must be one of early, late" in text
    assert "columns.0.nam: unknown key; did you mean columns.0.name?" in text
    with pytest.raises(ConfigError, match=r"split\.rowz: unknown key; did you mean split\.rows\?"):
        load(Example, None, ["title=x", "split.rowz=1"])


def test_fields_describe_every_leaf() -> None:
    fields = {field.path: field for field in describe_fields(RunConfig)}
    assert fields["quant.bits"].choices == ("2", "4", "8", "16", "32")
    assert fields["quant.bits"].kind == "2, 4, 8, 16 or 32"
    assert fields["optim.lr"].kind == "number > 0"
    assert fields["train.threads"].kind == "whole number > 0 or null"
    assert fields["data.shuffle"].choices == ("true", "false")
    assert fields["train.precision"].choices == ("fp32", "bf16", "int8")
    assert fields["model.bottom_mlp"].default == "[512, 256, 64]"
    assert all(field.help for field in fields.values()), "every field carries its help"
    paths = {field.path: field for field in describe_fields(Example)}
    assert list(paths) == ["title", "columns", "split.by", "split.rows", "split.start"]
    assert paths["split.by"].choices == ("early", "late")
    assert paths["title"].default == "required"


def test_every_described_default_is_accepted_as_an_override() -> None:
    for field in describe_fields(RunConfig):
        assert load(RunConfig, None, [f"{field.path}={field.default}"]) == RunConfig()


def test_shipped_configurations_load_and_open_with_a_comment() -> None:
    for name, line in shipped_configs().items():
        assert line, f"{name} has no first comment line"
        assert shipped_text(name)


def test_unknown_shipped_name() -> None:
    with pytest.raises(ConfigError, match="no shipped configuration is called 'cencus'"):
        load(RunConfig, "cencus")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load(RunConfig).name = "other"
