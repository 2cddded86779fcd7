"""The proof that a rewritten model computes what the plain one does.

check.check ─> subjects: plain, rewritten, other compiler ─ observation.observe ─> tensors ─ comparison.differences ─> result.CheckResult ─ table
                                                          liveness: does every hyper-connection take part?
"""
