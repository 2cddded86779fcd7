"""The result types of `explain`, `why`, `diff`, `check`, `audit`, `stability`, for annotations."""

from __future__ import annotations

from mhc_compile.inspection.audit import Audit
from mhc_compile.inspection.diff.results import ModelDiff
from mhc_compile.inspection.explain.results import AddExplanation, Explanation
from mhc_compile.inspection.stream_stats.results import Stability
from mhc_compile.inspection.verification.results import CheckResult

__all__ = ["AddExplanation", "Audit", "CheckResult", "Explanation", "ModelDiff", "Stability"]
