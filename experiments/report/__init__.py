"""What did an ablation show? Reads its directory and writes a page: `python -m experiments.report DIR --out DIR`."""

from experiments.report.page import write_report

__all__ = ["write_report"]
