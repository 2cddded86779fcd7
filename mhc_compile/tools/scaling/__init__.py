"""The cost of hyper-connections at sizes that no single machine runs: counts and rooflines."""
