"""The classifier as a function: images in, logits out, no state changed."""

from keras_emr.network.passes import Network, full_precision, layers_of

__all__ = ["Network", "full_precision", "layers_of"]
