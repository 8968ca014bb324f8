"""Data sets as checked NumPy arrays, and the batches that ``fit`` and ``evaluate`` read.

Importing this package imports neither keras nor scikit-learn: the two batch classes, which are
``keras.utils.PyDataset``, are loaded on first use.
"""

from keras_emr.data.dataset import Dataset
from keras_emr.data.order import epoch_order
from keras_emr.data.registry import available, load
from keras_emr.data.split import stratified_split

__all__ = [
    "Dataset",
    "EvalBatches",
    "TrainBatches",
    "available",
    "epoch_order",
    "load",
    "stratified_split",
]


def __getattr__(name: str):
    if name in ("TrainBatches", "EvalBatches"):
        from keras_emr.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module 'keras_emr.data' has no attribute {name!r}")
