"""Write a source of images as a TFDS data set: offline, and all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from keras_emr.data.dataset import NO_LICENCE
from keras_emr.data.source import Source
from keras_emr.data.tfds import data_folder, require_tfds
from keras_emr.errors import UserError, unknown

FILE_FORMATS = ("array_record", "tfrecord")
# Ours -> what TFDS calls it.
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def target(name: str, version: str, data_dir: str | os.PathLike | None = None) -> Path:
    """The folder that :func:`prepare` would make.

    Raises:
        UserError: a name or version that TFDS would not take, or the folder exists already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"name: not a name of a TFDS data set. Received: {name!r}. Expected lower-case letters,"
            " digits and _, such as my_images."
        )
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise UserError(f"version: not a version. Received: {version!r}. Expected such as 1.0.0.")
    folder = data_folder(data_dir) / name / version
    if folder.exists():
        raise UserError(
            f"this version is there already. Received: {str(folder)!r}. Expected another --version,"
            " another --name, or that folder removed."
        )
    return folder


def prepare(
    source: Source,
    name: str,
    *,
    version: str = "1.0.0",
    data_dir: str | os.PathLike | None = None,
    file_format: str = "array_record",
    licence: str | None = None,
) -> Path:
    """Write ``source`` with the features ``image`` and ``label``, in its own order.

    It is written beside its place and renamed, so that a run that is killed leaves no data set.
    Needs tensorflow-datasets and, for encoding, TensorFlow.

    Args:
        source: from :func:`keras_emr.data.registry.open_source`.
        name: lower-case letters, digits and ``_``.
        version: three numbers.
        data_dir: see :func:`keras_emr.data.tfds.data_folder`.
        file_format: ``array_record`` or ``tfrecord``; keras_emr reads both at random.
        licence: a note of the licence; ``None``: the source's.

    Returns:
        The new folder, ``DATA_DIR/NAME/VERSION``.

    Raises:
        UserError: see :func:`target`; an unknown format, tensorflow-datasets is missing, or the
            folder cannot be written.
    """
    if file_format not in FILE_FORMATS:
        raise unknown("file format", file_format, FILE_FORMATS)
    folder = target(name, version, data_dir)
    builder_class = _builder_class()
    root = folder.parents[1]
    aside = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix="-incomplete", dir=root))
        builder = builder_class(
            source, licence or source.licence, name, version, aside, file_format
        )
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints that it is "downloading"
            builder.download_and_prepare()
        folder.parent.mkdir(exist_ok=True)
        os.rename(aside / name / version, folder)
    except OSError as error:
        raise UserError(
            f"data set cannot be written: {error.strerror or error}. Received: {str(root)!r}."
            " Expected a folder with room that can be written to."
        ) from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _builder_class():
    tfds = require_tfds()
    tfds.disable_progress_bar()
    try:
        import importlib_resources  # noqa: F401  TFDS needs it for writing and does not say so

        tfds.core.utils.lazy_imports_utils.tensorflow.constant(0)
    except ImportError as error:
        raise UserError(
            f"data prepare: a package is missing. Received: {error}. Install what it needs with:"
            " pip install 'keras-emr[data]'"
        ) from None

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Writes the parts of a source; keys are positions, so that the order is kept."""

        def __init__(self, source, licence, name, version, data_dir, file_format):
            self._source, self._licence = source, licence
            self.name, self.VERSION = name, tfds.core.Version(version)
            super().__init__(data_dir=data_dir, version=version, file_format=file_format)

        def _info(self):
            image = tfds.features.Image(shape=self._source.image_shape, encoding_format="png")
            label = tfds.features.ClassLabel(names=list(self._source.class_names))
            stated = None if self._licence == NO_LICENCE else self._licence
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self._source.name}, prepared by keras-emr.",
                features=tfds.features.FeaturesDict({"image": image, "label": label}),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
                license=stated,
            )

        def _split_generators(self, dl_manager):
            parts = self._source.parts
            return {_SPLITS[split]: self._generate_examples(part) for split, part in parts.items()}

        def _generate_examples(self, part):
            for i, label in enumerate(part.labels.tolist()):
                yield i, {"image": part.read(np.array([i]))[0], "label": label}

    return Builder
