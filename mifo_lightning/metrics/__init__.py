"""torchmetrics of reasoning: avg@k and pass@k."""

from mifo_lightning.metrics.at_k import AverageAtK, PassAtK, pass_at_k

__all__ = ["AverageAtK", "PassAtK", "pass_at_k"]
