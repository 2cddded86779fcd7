"""Rewrite graphs outside `torch.compile`: exported programs and symbolic traces."""
