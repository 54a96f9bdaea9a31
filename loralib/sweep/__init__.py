"""Sweeps over tasks, methods, seeds and values: what to run, what is finished, and the processes. Imports no torch."""
