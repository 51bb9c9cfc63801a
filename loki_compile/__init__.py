"""loki_compile: `torch.compile(model, backend="loki")`."""
