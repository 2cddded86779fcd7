"""Options, presets and the specification of the coefficients. Torch-free."""
