"""Learned inner maximizers: small networks that turn input gradients into attack steps."""
