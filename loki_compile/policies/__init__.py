"""Ways to choose keys: one file each, one line each in `table`.

A policy says of every attention site of a graph how it chooses (`passes.policy.Choice`); a ranking
adds the node that makes positions, given queries, keys and what is kept beside their cache. What
all of them share is not theirs: caches and what mirrors them, masks, padding, groups, `attend`, the
runtime's proof that what is kept belongs to the cache.

    low_rank   "loki": keys ranked in R dims, by an index kept beside the cache
    exact      "oracle": keys ranked by themselves
    window     "window": the first and the last keys
    pages      "quest": keys ranked by bounds of their page

To add one, copy the file nearest to it, add its line to `table.RANKINGS` and its row to README.
"""
