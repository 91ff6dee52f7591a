"""What did an ablation show? Reads its directory and writes a page."""

from mifo_lightning.lab.report.page import write_page, write_report

__all__ = ["write_page", "write_report"]
