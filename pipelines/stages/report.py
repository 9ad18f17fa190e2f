"""``stage: report``: the models of a pipeline side by side.

Its output holds ``report.txt``, the table for people, and ``report.json``, the same for programs.
Bytes are counted on the disk, not computed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dqrm.pipelines.digests import folder_files
from dqrm.pipelines.stage import MODEL_FOLDER, Stage, StageContext

_QUALITY = ("best/", "test/")
_NO_COLUMN = ("best/step",)


class ReportStage(Stage):
    """Compare what the earlier stages made."""

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
        """Write the table."""
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
        text = json.dumps({"compare": base["stage"], "models": rows}, indent=2) + "\n"
        (context.output / "report.json").write_text(text, encoding="utf-8")
        (context.output / "report.txt").write_text(report_text(rows), encoding="utf-8")
        context.tracker.log_artifact(context.output / "report.txt")
        context.tracker.log_artifact(context.output / "report.json")
        return {f"size/{row['stage']}_bytes": float(row["bytes"]) for row in rows}


def report_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; a metric that a model lacks is left empty."""
    measured = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    header = ["stage", *measured, "parameters", "weights, bytes", "all files, bytes", "smaller"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        values = [row["metrics"].get(name) for name in measured]
        parameters = row["parameters"]
        lines.append(
            [
                row["stage"],
                *("" if value is None else f"{value:.4f}" for value in values),
                "" if parameters is None else f"{parameters:,}",
                f"{row['weight_bytes']:,}",
                f"{row['bytes']:,}",
                f"{row['times_smaller']:.2f} x",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "".join(
        "| "
        + " | ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |\n"
        for line in lines
    )


def _row(name: str, model: Path, metrics: Mapping[str, float]) -> dict[str, Any]:
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
    }
