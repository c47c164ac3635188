"""Reports that a browser shows."""

from memoir_retrieval.evaluation.report.page import (
    METHOD_FIGURES,
    calibration_page,
    method_figures,
    methods_page,
    routing_page,
    run_page,
    settings_page,
    shares_cell,
)

__all__ = [
    "METHOD_FIGURES",
    "calibration_page",
    "method_figures",
    "methods_page",
    "routing_page",
    "run_page",
    "settings_page",
    "shares_cell",
]
