"""Export a trained classifier to TensorFlow Serving, if it passes the parity gate."""

from keras_emr_serving.export.parity import ParityError
from keras_emr_serving.export.publish import export
from keras_emr_serving.export.stages import ExportFailed

__all__ = ["ExportFailed", "ParityError", "export"]
