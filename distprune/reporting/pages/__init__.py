"""Reports to open in a browser: one HTML file each, with everything that it needs inside."""

from distprune.reporting.pages.comparison_page import comparison_page, leave_comparison
from distprune.reporting.pages.run_page import RunMaterial, run_page
from distprune.reporting.pages.run_report import leave_report

__all__ = ["RunMaterial", "comparison_page", "leave_comparison", "leave_report", "run_page"]
