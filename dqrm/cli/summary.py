"""What a training run came to, for a person."""

from typing import TYPE_CHECKING

from dqrm.text import bytes_text, pairs

if TYPE_CHECKING:
    from dqrm.config import RunConfig
    from dqrm.training.run import TrainResult


def summary(result: "TrainResult", config: "RunConfig") -> str:
    """Metrics, sizes, speed and where the run is, one line each."""
    rows = [("run", str(result.run_dir))]
    if result.validation is not None:
        rows.append(
            (
                "validation",
                f"AUC {result.validation.auc:.4f}, log loss {result.validation.log_loss:.4f} "
                f"(best model, step {result.best_step})",
            )
        )
    if result.test is not None:
        rows += [
            ("test AUC", f"{result.test.auc:.4f}"),
            ("test log loss", f"{result.test.log_loss:.4f}"),
        ]
    rows.append(("FP32 size", bytes_text(result.fp32_bytes)))
    if result.packed_bytes < result.fp32_bytes:
        bits = {config.quant.bits, *config.quant.table_bits.values()}
        whole = len(bits) == 1 and bits <= {2, 4, 8}
        label = f"INT{config.quant.bits} size" if whole else "packed size"
        ratio = result.fp32_bytes / result.packed_bytes
        rows.append((label, f"{bytes_text(result.packed_bytes)} ({ratio:.1f} times smaller)"))
    rows.append(("speed", f"{result.samples_per_second:,.0f} samples/s"))
    if result.run_id is not None:
        rows.append(("MLflow run", f"{result.run_id} in {result.tracking_uri}"))
        rows.append(("look at it", _ui_command(config)))
    if result.interrupted is not None:
        rows.append(("interrupted", f"go on with: dqrm train --resume {result.run_dir}"))
    return pairs(rows)


def _ui_command(config: "RunConfig") -> str:
    uri = config.tracking.uri
    return f"dqrm ui --backend-store-uri {uri}" if uri else "dqrm ui"
