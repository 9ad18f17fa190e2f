"""What the exchange costs, for MLflow: bytes, their ratio to FP32, seconds, what is still owed."""

import math

from dqrm.comm.exchange import Exchange


class ExchangeMetrics:
    """Metrics of one rank's exchange since they were last asked for.

    ``comm/ratio`` is to the same collectives in FP32, with row numbers as int64.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._before = self._totals()

    def _totals(self) -> dict[str, float]:
        return self._exchange.meter.report()["total"]

    def since_last(self, steps: int) -> dict[str, float]:
        """Return the metrics of the last ``steps`` steps, at least 1."""
        now, before = self._totals(), self._before
        self._before = now
        spent = {name: now[name] - before.get(name, 0.0) for name in now}
        metrics = {
            "comm/sent_bytes_per_step": spent["sent_bytes"] / steps,
            "comm/received_bytes_per_step": spent["received_bytes"] / steps,
            "comm/exposed_seconds": spent["exposed_seconds"] / steps,
            "comm/hidden_seconds": max(0.0, spent["busy_seconds"] - spent["exposed_seconds"])
            / steps,
            "comm/residual_norm": math.hypot(*self._exchange.residual_norms().values()),
        }
        if spent["sent_bytes"]:
            metrics["comm/ratio"] = spent["raw_bytes"] / spent["sent_bytes"]
        return metrics
