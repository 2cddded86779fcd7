"""One decoder, trained with plain residual adds and with five mappings of the residual streams.

plan, model -> training (one run) -> processes (all runs, and their cost) -> numbers, summary (every
figure) -> plots, report.
"""
