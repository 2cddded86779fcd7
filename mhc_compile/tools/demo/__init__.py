"""`mhc demo`: one small transformer trained twice on the standard library's sources, plain and with hyper-connections.

The parts: `settings` (what is run), `corpus` and `tasks` (the data), `models`, `side` and `training` (the two sides,
step by step), `checkpoint`, `interrupt`, `inductor`, `determinism`, `progress`, `result` (every figure), `plots` and
`summary` (how they are shown), `session` (all of it in order).
"""
