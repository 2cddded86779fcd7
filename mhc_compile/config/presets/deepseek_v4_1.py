"""DeepSeek-V4.1: DeepSeek-V4's coefficients in a single pass over the streams.

The weights `pre` that a site computes collapse the streams for the next site: what they are
computed from need not be read a second time. The first site reads the trunk itself, and the weights
of the last one end the chain.
"""

from dataclasses import replace

from mhc_compile.config.presets.deepseek_v4 import DEEPSEEK_V4

DEEPSEEK_V4_1 = replace(
    DEEPSEEK_V4,
    name="deepseek-v4.1",
    source="DeepSeek-V4.1, single pass; no module of transformers 5.23 has it",
    read_out="mean",
    single_pass=True,
)
