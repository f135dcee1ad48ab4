"""Reports to open in a browser: one HTML file each, with everything that it needs inside."""

from distprune.reporting.pages.comparison_report import comparison_report
from distprune.reporting.pages.run_report import draw_report

__all__ = ["comparison_report", "draw_report"]
