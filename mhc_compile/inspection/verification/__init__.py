"""Verification that a rewritten model computes what the plain one does.

check -> runners: plain, rewritten, other compiler -> comparison: records of runs, differences
      -> results.CheckResult -> tables
"""

from mhc_compile.inspection.verification import tables  # noqa: F401 - registers the renderer
