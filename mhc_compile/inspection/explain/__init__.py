"""Explain which residual adds are rewritten, and why the others are skipped."""

from mhc_compile.inspection.explain import tables as _tables  # noqa: F401 - registers the renderers
