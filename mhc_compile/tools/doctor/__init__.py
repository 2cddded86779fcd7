"""`mhc doctor`: whether everything is there that `torch.compile(model, backend="mhc")` needs, and works."""
