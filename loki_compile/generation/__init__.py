"""Around decode loops, above the compiler: caches are corrected, and drafts verified.

    caches      what of transformers' caches can be rewound, and rewinding it
    feed        the calls of a model: by a loop of one's own, or as `generate` makes them
    correction  tokens that were decoded sparsely go through dense attention once more
    pace        how many tokens to draft, by what cycles take and what is accepted
    verdicts    which drafts dense decoding would have produced
    lossless    sparse steps draft, a dense one verifies
    rings       slots for the keys that spans read, and which of them a row reads
    span_plans  the spans of each layer of a model, by a plan
    span_cache  a cache of transformers that keeps those keys alone

The rest of the package knows no cache of a library, and no loop; caches of transformers are told
by what they can do, and only `span_cache`, which is one, imports transformers.
"""
