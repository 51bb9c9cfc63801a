"""FX analysis and rewriting of the graphs that Dynamo hands to a backend.

Order, as `loki_compile.backend` runs it:

    normalize      a copy of the graph in one spelling: methods become functions, aliases collapse
    sites          every attention core becomes an `AttentionSite`, or `Skipped` with a reason
    cache_writes   from a site's keys back to the cache they are read from and the writes into it
    plan           per site: sparse, or dense with a reason                (decides, never edits)
    rewrite        the dense variant (packed groups) and the sparse one    (edits, never decides)

Invariants of a graph here: it is a Dynamo graph, so calls are torch-level, mutation is visible,
a placeholder is a tensor or a symbolic integer, and `meta["example_value"]` of each node is its
fake value. Analysis never edits; every node that rewriting adds carries a fake value as well.
Nothing in this folder knows a model or a model library.
"""
