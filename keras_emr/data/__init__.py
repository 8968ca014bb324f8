"""Data sets as checked NumPy arrays, and the batches that ``fit`` and ``evaluate`` read.

Importing this package imports neither keras nor scikit-learn: ``TrainBatches``, a
``keras.utils.PyDataset``, is loaded on first use.
"""

from keras_emr.data.dataset import Dataset
from keras_emr.data.order import epoch_order
from keras_emr.data.registry import available, load
from keras_emr.data.split import stratified_split

__all__ = [
    "Dataset",
    "TrainBatches",
    "available",
    "epoch_order",
    "load",
    "stratified_split",
]


def __getattr__(name: str):
    if name == "TrainBatches":
        from keras_emr.data.batches import TrainBatches

        return TrainBatches
    raise AttributeError(f"module 'keras_emr.data' has no attribute {name!r}")
