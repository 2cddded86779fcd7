"""Measurements. Each module runs by itself: `python -m mhc_compile.tools.bench.passes`."""
