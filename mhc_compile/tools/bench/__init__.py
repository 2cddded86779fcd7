"""Benchmarks of hyper-connections and of the passes. `README.md` is the guide."""
