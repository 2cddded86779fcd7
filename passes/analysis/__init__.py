"""Facts about a graph: operations, aliases, dependence, feature axes, provenance."""
