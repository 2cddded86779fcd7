"""What the hyper-connections of a model do to signals and gradients over depth.

measure.stability ─> recording: runs the rewritten graph ─> chains: products of H_res, reduced site by site ─> result.Stability ─> table, plots
callback.StabilityCallback: the same, every so many steps of a training; its `frameworks` are transformers and Lightning
gain.gain: the composite gains alone
"""
