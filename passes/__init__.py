"""FX analysis and rewriting of the graphs that Dynamo hands to a backend.

Each file imports only from those above it. The vocabulary first:

    calls          what a call is: name, operands, fake value, what it writes, what shares memory
    graphs         copies, new nodes, extraction; which input brings a size, which weight a tensor
    attention      what an attention core and a site are, and the reasons why one stays dense
    caches         what the cache behind a site's keys is, and a write into it
    views          a tensor as a rearrangement of another: one algebra, one table of calls
    heads          keys and values behind their repetition over a group of query heads
    write_forms    the calls that store new keys in a cache

then, in the order in which `loki_compile.backend` runs them, what brings a graph into one form,

    normalize      a copy of the graph in one spelling: methods become functions, aliases collapse
    shared_caches  caches that are cut out of one tensor become inputs of their own

what reads it (decides, never edits),

    products       the two products of attention written out
    score_steps    what may lie between the first product and the softmax
    written_out    a spelling: products around a softmax
    sdpa           a spelling: the call of `scaled_dot_product_attention`
    flex           a spelling: the call of `flex_attention`
    flash          a spelling: the op of FlashAttention-2
    sites          every attention core becomes an `AttentionSite`, or `Skipped` with a reason
    trace_caches   from a site's keys back to the cache they are read from and the writes into it
    latent         attention over a cached latent, where each step expands keys and values from one
    rotary         keys and queries before their rotation, and which dims of theirs turn together
    prompts        the caches that a prefill asks queries of
    span_prefills  the cores of a prefill that a plan of spans can serve
    slots          which sites number their keys alike: what one chose, another may read
    policy         what a policy may say: a choice per site, by a ranking
    plan           per site: sparse, or dense with a reason
    appends        tensors that a graph makes longer, and whether that can be done in their memory
    rollback       what to save so that a graph that failed half-way can be run again
    blocks         a graph as a row of pieces, of which equal ones are compiled once
    row_products   a matrix times few rows: what is found, and its one edit

and what rewrites it (edits, never decides):

    emit           nodes that several edits add: views, calls like the model's, layouts
    moments        what a prefill's queries are like, as outputs beside its own
    dense          the dense variant: our exact attention, or query groups packed
    prompts_by_spans  attention of a prompt over spans
    in_place       new rows written behind their past, instead of a `cat` of both
    mirror         each write into a cache, repeated on the index that is kept beside it
    masks          the masks of a site as one
    sparse         the sparse variant: a core becomes positions and attention over them

Invariants of a graph here: it is a Dynamo graph, so calls are torch-level, mutation is visible,
a placeholder is a tensor or a symbolic integer, and `meta["example_value"]` of each node is its
fake value. Analysis never edits; every node that rewriting adds carries a fake value as well.
Nothing in this folder knows a model or a model library.
"""
