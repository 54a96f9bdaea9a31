"""Speed, and nothing else: the same numbers as plain torch gives, in fewer operations and with less memory.

`low_rank` stands below `loralib.layers`, which calls it once; `prepare` and `deberta` stand above it. Without them
every layer and every model computes the same.
"""
