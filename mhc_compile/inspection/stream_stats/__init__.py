"""Signal and gradient propagation through the hyper-connections of a model, over depth.

measure.stability -> recorder: run the rewritten graph, reduce H_res and streams site by site
                  -> results.Stability -> tables, plots
"""

from mhc_compile.inspection.stream_stats import plots, tables  # noqa: F401 - registers the renderers
