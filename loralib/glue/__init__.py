"""GLUE: task table, loading, tokenising, metrics, shared arguments, run report. Knows no method."""
