"""GLUE: task table, loading, tokenising, metrics, shared arguments, run report. Imports no method."""
