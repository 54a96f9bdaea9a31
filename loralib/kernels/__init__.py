"""Speed and nothing else: the numbers of plain torch in fewer operations and with less memory.

`loralib.layers` calls `low_rank` in one place. `prepare` and `deberta` use the layers. Without this package every layer
and every model computes the same.
"""
