"""Speed and nothing else: the numbers of plain torch in fewer operations and with less memory.

`loralib.layers` calls `low_rank` in one place, and `prepare` prepares its layers. `deberta` uses `banded` and knows no
layer. Every function computes what a few lines of plain torch compute, up to rounding; the tests compare the two.
"""
