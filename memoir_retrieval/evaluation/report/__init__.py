"""Reports that a browser shows."""

from memoir_retrieval.evaluation.report.page import (
    calibration_page,
    methods_page,
    routing_page,
    run_page,
    settings_page,
)

__all__ = ["calibration_page", "methods_page", "routing_page", "run_page", "settings_page"]
