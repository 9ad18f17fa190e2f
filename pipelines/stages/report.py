"""``stage: report``: the models of a pipeline side by side.

Its output holds ``report.txt``, tables for people, and ``report.json``, the same for programs.
Bytes are counted on the disk, not computed. An encoder is a transformer's layers: what is left of
it without embeddings, pooler and head. Latency is that of ``stage: lower``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from dqrm.pipelines.digests import folder_files
from dqrm.pipelines.stage import MODEL_FOLDER, Stage, StageContext
from dqrm.text import bytes_text, table

_QUALITY = ("best/", "test/")
_NO_COLUMN = ("best/step",)
_LATENCY = re.compile(r"latency/(.+)/lowered_ms")


class ReportStage(Stage):
    """Compare what the earlier stages made."""

    shows_times: ClassVar[bool] = True

    stage: Literal["report"] = "report"
    """Compare the models of the earlier stages: metrics, parameters, bytes on disk."""

    compare: str | None = None
    """Stage whose model the others are held against; the first one that made a model when not
    given."""

    def inputs(self, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
        """Every earlier stage."""
        if not earlier:
            raise ValueError("there is nothing to report: it needs a stage before it")
        if self.compare is not None and self.compare not in earlier:
            raise ValueError(
                f"compare={self.compare}: no earlier stage is called so; there are: "
                f"{', '.join(earlier)}"
            )
        return tuple(earlier)

    def run(self, context: StageContext) -> dict[str, float]:
        """Write the tables."""
        from dqrm.data.files import finite_or_null, write_json

        rows = [
            _row(name, folder / MODEL_FOLDER, context.metrics[name])
            for name, folder in context.inputs.items()
            if (folder / MODEL_FOLDER).is_dir()
        ]
        if not rows:
            raise ValueError("no earlier stage made a model")
        base = next((row for row in rows if row["stage"] == self.compare), rows[0])
        if self.compare is not None and base["stage"] != self.compare:
            raise ValueError(f"compare={self.compare}: that stage made no model")
        for row in rows:
            row["times_smaller"] = base["weight_bytes"] / row["weight_bytes"]
            if base["encoder_bytes"] and row["encoder_bytes"]:
                row["encoder_times_smaller"] = base["encoder_bytes"] / row["encoder_bytes"]
        record = finite_or_null({"compare": base["stage"], "models": rows})
        write_json(context.output / "report.json", record)
        (context.output / "report.txt").write_text(report_text(rows), encoding="utf-8")
        context.tracker.log_artifact(context.output / "report.txt")
        context.tracker.log_artifact(context.output / "report.json")
        return {f"size/{row['stage']}_bytes": float(row["bytes"]) for row in rows}


def report_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of quality, sizes and latency, a line a model; without what no model has."""
    tables = [_quality_table(rows), _size_table(rows), _latency_table(rows)]
    return "\n\n".join(part for part in tables if part) + "\n"


def _quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if not names:
        return ""
    headings = [re.sub("[/_]", " ", name.removeprefix("best/")) for name in names]
    lines = []
    for row in rows:
        values = [row["metrics"].get(name) for name in names]
        lines.append([row["stage"], *("-" if v is None else f"{v:.4f}" for v in values)])
    return table(["stage", *headings], lines)


def _size_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["stage", "parameters", "all files", "weights", "smaller"]
    encoders = any("encoder_times_smaller" in row for row in rows)
    header += ["encoder", "smaller"] if encoders else []
    lines = []
    for row in rows:
        parameters = row["parameters"]
        line = [
            row["stage"],
            "-" if parameters is None else f"{parameters:,}",
            bytes_text(row["bytes"]),
            bytes_text(row["weight_bytes"]),
            f"{row['times_smaller']:.2f} x",
        ]
        if "encoder_times_smaller" in row:
            line += [bytes_text(row["encoder_bytes"]), f"{row['encoder_times_smaller']:.2f} x"]
        elif encoders:
            line += ["-", "-"]
        lines.append(line)
    return table(header, lines)


def _latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    timed = [row for row in rows if row["latency"]]
    if not timed:
        return ""
    shapes = list(dict.fromkeys(shape for row in timed for shape in row["latency"]))
    rivals = list(
        dict.fromkeys(name for row in timed for times in row["latency"].values() for name in times)
    )
    rivals.remove("lowered")
    lines = []
    for row in timed:
        for shape in shapes:
            times = row["latency"].get(shape)
            if times is not None:
                faster = [
                    f"{times[name] / times['lowered']:.2f} x" if name in times else "-"
                    for name in rivals
                ]
                lines.append([row["stage"], shape, f"{times['lowered']:.2f} ms", *faster])
    faster_than = [f"faster than {name.replace('_', ' ')}" for name in rivals]
    return table(["stage", "batch", "latency", *faster_than], lines, left=2)


def _latencies(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By shape of the batch and threads, the milliseconds of the model and of its contestants."""
    found = {}
    for metric in metrics:
        match = _LATENCY.fullmatch(metric)
        if match is None:
            continue
        begin = f"latency/{match[1]}/"
        found[match[1].replace("/", ", ").replace("_", " ")] = {
            name.removeprefix(begin).removesuffix("_ms"): value
            for name, value in metrics.items()
            if name.startswith(begin) and name.endswith("_ms")
        }
    return found


def _row(name: str, model: Path, metrics: Mapping[str, float]) -> dict[str, Any]:
    from dqrm.compress.lower.folder import encoder_bytes

    sizes = {path: path.stat().st_size for path in folder_files(model)}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    parameters = metrics.get("size/parameters")
    return {
        "stage": name,
        "metrics": {
            key: value
            for key, value in metrics.items()
            if key.startswith(_QUALITY) and key not in _NO_COLUMN
        },
        "parameters": None if parameters is None else int(parameters),
        "weight_bytes": weights,
        "bytes": sum(sizes.values()),
        "encoder_bytes": encoder_bytes(model) if (model / "config.json").is_file() else None,
        "latency": _latencies(metrics),
    }
