"""How good edits are and how fast a lookup is: scores, thresholds, data sets, reports."""
