"""Measurements. Each module runs by itself: `python -m mhc_compile.bench.passes`."""
