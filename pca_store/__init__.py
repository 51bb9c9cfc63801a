"""Bases: fit (covariance, score_fit, attention_fit), hold (basis), say what they are (metadata),
file format (basis_file, basis_header), lookup (store). Beside them, plans of which layers choose
(layer_plan).

File format, version 3. One safetensors file per basis set. Its header holds, besides the tensors:

`__metadata__["loki_compile.basis"]`, a JSON object:
    format              3
    kind                "pca", "score-optimal", "attention" or "random"
    model               name of the model, for display
    model_fingerprint   hash of the sites' sorted fingerprints
    calibration         "pre-rotary" or "post-rotary"
    dtype, rope         dtype and RoPE parameters of the model
    source, versions, created   text, library versions, ISO 8601 date
    sites               one per distinct key cache, in the model's order: layer, weights
                        (fingerprint), num_kv_heads, head_dim, columns, tokens, blocks (from
                        version 2 on), measured (from version 3 on)
`__metadata__["loki_compile.sha256"]`: sha256 over the JSON text above and, by sorted tensor name,
    the name and the little-endian bytes of each tensor.

Tensors of site i, all fp32: `key.i` (Hkv, D, C), `spectrum.i` (Hkv, D), and for "score-optimal"
and "attention" also `query.i` (Hkv, D, C); other kinds use the key's projection for queries.
Nothing else may be there.
"""
