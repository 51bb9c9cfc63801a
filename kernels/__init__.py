"""The `loki::` ops: choose the keys worth reading, then attend to those alone.

1. `select` projects each query into the rank-R space of the key index: `q_low = q @ basis`, fp32.
2. It streams the index once per KV head: `score[t] = scale * q_low . index[t] (* index_scale[t])`.
3. A KV group shares its choice: the score of a key is the maximum over the group's query heads.
4. Hidden keys are never chosen; an additive mask is added to the score.
5. A row (batch row, head, query token) decides by what it sees: fewer than `min_keys` keys are all
   chosen; else its budget is a fraction of them, at most `top_k`, and the last `recent` and first
   `sink` of them are always in it. NaN ranks with -inf; ties go to the LOWER position.
6. Chosen positions are written ascending, int32, then -1: (B, Hkv or Hq, S, K). K holds the choice
   of any row over T keys (`budget.Budget.slots`); it is not the budget of a row.
7. `attend` reads K and V at these positions alone and is exact over them: softmax in fp32.
8. A row without positions is computed over all T keys, as scaled_dot_product_attention would.

Shapes (legend: B batch, Hq query heads, Hkv KV heads, G = Hq/Hkv, S new tokens, T cached tokens,
D dims of q and k, Dv dims of v, R index dims, K slots):
q (B,Hq,S,D), k (B,Hkv,T,D), v (B,Hkv,T,Dv), basis (Hkv,D,R) or (B,Hkv,D,R), index (B,Hkv,T,R),
index_scale (B,Hkv,T,1), mask broadcastable to (B,Hq,S,T), positions (B,Hkv or Hq,S,K).

`ops` is the public door, `reference` the definition, `budget` how many keys a row chooses, `fused`
the plain torch around the ops; `cpu`, `triton_select` and `triton_attend` implement them.
"""
