"""Ways to choose keys: one file each, one line each in `table`.

A policy says of every attention site of a graph how it chooses (`passes.policy.Choice`); a ranking
adds the node that makes positions, given queries, keys and what is kept beside their cache. What
all of them share is not theirs: caches and what mirrors them, masks, padding, groups, `attend`, the
runtime's proof that what is kept belongs to the cache.

    low_rank   "loki": keys ranked in R dims, by an index kept beside the cache
    exact      "oracle": keys ranked by themselves
    window     "window": the first and the last keys
    pages      "quest": keys ranked by bounds of their page
    unified    "unified": keys ranked by themselves, one set for all heads
    sparq      "sparq": keys ranked in the dims in which queries are largest
    moa        "moa": the first keys and a span of the last ones, of each KV head its own

A policy may also have a site read what an earlier one chose (`Choice.source`).

    kinds      the words for what a layer does: choose, reuse, read all keys
    head_budgets  those for how many keys each of its KV heads reads
    presets    plans of all layers by name: which choose
    layers     from the kinds of layers to the choices of sites

To add one, copy the file nearest to it, add its line to `table.RANKINGS`, its name to
`kinds.RANKINGS` and its row to docs/options.md.
"""
