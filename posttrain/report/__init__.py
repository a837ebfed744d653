"""A run directory, or several, turned into one self-contained HTML page."""

from posttrain.report.page import write_report

__all__ = ["write_report"]
