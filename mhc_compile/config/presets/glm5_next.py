"""GLM-5-next: DeepSeek-V4's coefficients; chains end with the mean of the streams."""

from dataclasses import replace

from mhc_compile.config.presets.deepseek_v4 import DEEPSEEK_V4

GLM5_NEXT = replace(
    DEEPSEEK_V4,
    name="glm5-next",
    source="transformers.models.glm5_next (Glm5NextTextHyperConnection, Glm5NextTextHyperHead)",
    eps=1e-5,
    read_out="mean",
)
