"""One decoder, trained with plain residual adds and with five mappings of the residual streams: what is stable, what is better, what it costs.

The parts: `plan` (what is run), `model`, `data` and `training` (one run), `worker` and `conduct` (all runs, in processes), `cost` (time and memory,
in turn), `numbers` (statistics), `summary` (every figure), `plots` and `text` (how they are shown).
"""
