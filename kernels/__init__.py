"""The `loki::` ops: choose the keys worth reading, then attend to those alone.

1. `select` scores the keys of each KV head, by one of three scorers, in fp32.
   Low-rank (a basis is given): queries are projected into the rank-R space of the key index,
   `q_low = q @ basis`, and `score[t] = scale * q_low . index[t] (* index_scale[t])`.
   Exact (no basis): the index is the cache's keys, `score[t] = scale * q . index[t]`.
   Pages (no basis, page > 1): the index holds minima, then maxima, of each page of `page` keys, and
   each of these has the most that any of them could have,
   `score[t] = scale * sum_d max(q[d] * min[d], q[d] * max[d])` (Quest, arXiv 2406.10774).
2. The index is streamed once. NaN scores count as -inf.
3. A KV group shares its choice. Either the score of a key is the maximum over the group's query
   heads; or, by probability, the sum of the heads' softmaxes over the keys that the row sees, as
   its logarithm, so that none is too small to be ranked.
4. Hidden keys are never chosen; an additive mask is added to the score.
5. A row (batch row, head, query token) decides by what it sees: fewer than `min_keys` keys are all
   chosen; else its budget is a fraction of them, at most `top_k`, and the last `recent` and first
   `sink` of them are always in it. NaN ranks with -inf; ties go to the LOWER position.
6. Chosen positions are written ascending, int32, then -1: (B, Hkv or Hq, S, K). K holds the choice
   of any row over T keys (`budget.Budget.slots`); it is not the budget of a row.
7. `attend` reads K and V at these positions alone and is exact over them: softmax in fp32.
8. A row without positions is computed over all T keys, as scaled_dot_product_attention would.
   `attention` is that for all rows: it reads a KV head's keys once for all query heads and tokens.
   With `ranges` a row reads two runs of keys instead, of each KV head its own, all where both are
   empty; the work is split among tokens, so that the longest row does not decide the time.

9. `update_pages` and `extend_pages` keep the bounds of pages: those of a page in which this step
   stored a token become minima and maxima from its start to the last token stored in it.
10. With a `mass` a row's budget is a ceiling: behind the keys that are always in it, it has the
   fewest of the best whose weights add up to that share. Weights are the softmax, over the keys
   that the row sees, of the scores that it ranks by: of one head, attention as the scorer
   estimates it; of a group, by probability the mean of the heads', else one that hears its
   loudest head alone. Infinite scores weigh nothing and rank as they are. A row without a finite
   score has its ceiling. `select_weighed` gives (B, Hkv or Hq, S, 2) as well: how many keys a row
   has chosen, and the share of its weights that it has left out, by a `mass` or without; 0 where
   a row reads all it sees, or chooses nothing.
11. With `budgets` (B,heads,S,2), of KV heads each its own (`budget.HeadBudgets`), a row has as many
   keys as its first number says, at most `slots`, of which the second says how many are the last
   ones; the first `sink` are always in it. Where these are all of them, or there are none, the row
   ranks nothing, and no score of it is computed unless its keys are weighed.

Shapes (legend: B batch, Hq query heads, Hkv KV heads, G = Hq/Hkv, S new tokens, T cached tokens,
P = ceil(T/page) pages or more, D dims of q and k, Dv dims of v, R index dims, K slots):
q (B,Hq,S,D), k (B,Hkv,T,D), v (B,Hkv,T,Dv), basis (Hkv,D,R) or (B,Hkv,D,R), index (B,Hkv,T,R) or
(B,Hkv,T,D) or pages (B,Hkv,P,2D), index_scale (B,Hkv,T,1), mask broadcastable to (B,Hq,S,T),
written broadcastable to (B,Hkv,T,1), positions (B,Hkv or Hq,S,K), ranges (B,Hkv,S,4) or broadcast.

`ops` is the public door, `reference` the definition, `budget` how many keys a row chooses, `spans`
how many of the last ones a KV head reads, `kept` what is kept beside a cache. The plain torch that
Inductor fuses around the ops is in `fused` (rows, layouts, maps), `masks`, `positions` (without a
ranking of scores) and `moments` (of a prompt's queries). `cpu` (C++, in cpu_*.cpp, or the PyTorch
ops of `cpu_torch`) and `triton_select` (scores in `triton_score`, weights in `triton_weigh`, the
choice in `triton_choose`, what is always chosen in `triton_window`), `triton_attend` (its kernels
in `triton_splits`, shares of ranges in `triton_ranges`) and `triton_pages` implement the ops.
`span_prefill` is of prompts, by FlexAttention; `row_products` of what is no attention: a matrix
times few rows, as a sum that Inductor vectorises.
"""
