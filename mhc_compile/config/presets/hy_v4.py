"""HY-V4: streams are not mixed (H_res = I); pre and post have an epsilon; a learned read-out."""

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets.base import Preset

HY_V4 = Preset(
    name="hy-v4",
    source="transformers.models.hy_v4 (HYV4HyperConnection, HYV4HyperHead)",
    convention=Convention(mapping="identity", pre_eps=1e-6, post_eps=1e-6),
    eps=1e-5,
    read_out="learned",
)
