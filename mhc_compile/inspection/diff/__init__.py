"""What the rewrite changes in a graph, as data and as pictures.

    dry_run ─ stages ─> two FX graphs and a plan ─ views ─> two lists of `NodeView` ─ rows ─> `Row`s with a `Change` each
            ─ model_diff ─> `ModelDiff`, which text, page, drawing and JSON render

Nothing here decides what is rewritten: the plan that `explain` reports and the backend follows is read, and the passes that the backend runs are run.
"""
