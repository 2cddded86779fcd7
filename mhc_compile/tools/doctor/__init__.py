"""`mhc doctor`: check what `torch.compile(model, backend="mhc")` needs, and that it works."""
