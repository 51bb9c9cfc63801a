"""The `loki::` ops."""
