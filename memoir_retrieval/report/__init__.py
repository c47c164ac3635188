"""Reports that a browser shows."""

from memoir_retrieval.report.page import calibration_page, run_page, settings_page

__all__ = ["calibration_page", "run_page", "settings_page"]
