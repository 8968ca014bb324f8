"""Ask a served model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError, unknown
from keras_emr_serving.client.address import parse
from keras_emr_serving.client.errors import ClientError
from keras_emr_serving.client.retry import Retry

_DEFAULT = "serving_default"
_MOST_IMAGES, _MOST_BYTES = 256, 8 << 20


class Client:
    """A model behind TensorFlow Serving, or behind ``keras-emr serve``.

    Nothing is asked before the first method is called. REST needs neither TensorFlow nor Keras
    here; gRPC imports both with its stubs. One client is for one thread.

    Args:
        url: ``http://HOST:8501/v1/models/NAME``, or ``grpc://HOST:8500/v1/models/NAME``; with
            ``/versions/N`` or ``/labels/L`` after it for one that is not the latest; ``https``
            and ``grpcs`` for TLS.
        protocol: ``rest`` or ``grpc``; ``None``: what the URL says.
        version, label: as in the URL.
        timeout: seconds for one request: over REST to connect and between two parts of an answer.
        retries: a number, or a :class:`keras_emr_serving.client.retry.Retry`, which tells when a
            request is sent again.
        batch_size: most images in one request; ``None``: 256, or as many as make 8 MiB.
        ca: PEM file with the certificates to trust; ``None``: the usual ones.
        certificate, key: PEM files of this client, for a server that asks for them.
        headers: name -> value, sent with every request.

    Raises:
        UserError: a URL or an option that means nothing.

    Every method raises :class:`ClientError` for what went wrong on the way or at the server.
    """

    def __init__(
        self,
        url,
        *,
        protocol=None,
        version=None,
        label=None,
        timeout=30.0,
        retries=4,
        batch_size=None,
        ca=None,
        certificate=None,
        key=None,
        headers=None,
    ):
        self.address = parse(url, protocol, version, label)
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout: bad value. Received: {timeout}. Expected seconds > 0.")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: bad value. Received: {batch_size}. Expected >= 1.")
        if key is not None and certificate is None:
            raise UserError(f"key: without its certificate. Received: {str(key)!r}. Give both.")
        if (ca or certificate) and not self.address.tls:
            raise UserError(
                f"certificates: the URL is without TLS. Received: {self.address.model_url!r}. "
                "Expected https or grpcs."
            )
        self.batch_size = batch_size
        self.retry = retries if isinstance(retries, Retry) else Retry(retries)
        if self.address.protocol == "rest":
            from keras_emr_serving.client.rest import RestTransport as Transport
        else:
            from keras_emr_serving.client.grpc_transport import GrpcTransport as Transport
        self._transport = Transport(self.address, timeout, ca, certificate, key, headers)
        self._known = None

    @property
    def url(self) -> str:
        """The model's address, with its version or label."""
        return self.address.model_url

    def status(self):
        """Versions of the model: list of :class:`VersionStatus`."""
        return self.retry.call(self._transport.status)

    def metadata(self, fresh=False):
        """Name, version number and signatures: :class:`Metadata`; asked for once.

        Args:
            fresh: ask again.
        """
        if self._known is None or fresh:
            self._known = self.retry.call(self._transport.metadata)
        return self._known

    def signature(self, name=_DEFAULT):
        """:class:`Signature` ``name``. Raises :class:`UserError` if the model has none."""
        signatures = self.metadata().signatures
        if name not in signatures:
            raise unknown(f"signature of {self.url}", name, sorted(signatures))
        return signatures[name]

    def image_shape(self, signature=_DEFAULT):
        """(H, W, C) of the images, ``None`` for a side that is free.

        Raises:
            UserError: the signature does not take one float tensor of images.
        """
        return self._image_input(signature)[1]

    def _image_input(self, signature):
        inputs = self.signature(signature).inputs
        name, tensor = next(iter(inputs.items()), (None, None))
        fits = len(inputs) == 1 and tensor.dtype == "DT_FLOAT" and tensor.shape is not None
        if not fits or len(tensor.shape) != 4 or tensor.shape[3] is None:
            told = ", ".join(f"{n} {t.dtype} {t.shape}" for n, t in inputs.items()) or "no input"
            raise UserError(
                f"signature {signature!r} of {self.url} does not take images. Received: {told}. "
                "Expected one DT_FLOAT input (None, H, W, C)."
            )
        return name, tensor.shape[1:]

    def labels(self, signature=_DEFAULT):
        """Names of the classes in the order of the logits; ``None`` if the model gives none.

        They come from the signature ``classify``, where keras_emr's exports have them in this
        order.
        """
        name, shape = self._image_input(signature)
        if "classify" not in self.metadata().signatures or None in shape:
            return None
        try:
            found = self.retry.call(lambda: self._transport.label_names(name, int(np.prod(shape))))
        except ClientError as error:
            if error.mistake:  # somebody else's `classify`
                return None
            raise
        return found if all(found) and len(set(found)) == len(found) else None

    def predict(self, images, signature=_DEFAULT):
        """Classify images.

        Args:
            images: (N, H, W, C) or (N, H, W), uint8 or float in [0, 1]; or image files (a path,
                or a list of them; see :func:`keras_emr_serving.client.images.read_images`).
            signature: name of the function to run.

        Returns:
            Outputs by name, the N images first: of an exported model ``probabilities`` and
            ``logits`` (N, K) float32 and ``class_id`` (N,) int64.

        Raises:
            UserError: images that the model does not take, files that cannot be read.
        """
        name, shape = self._image_input(signature)
        if isinstance(images, str | Path):
            images = [images]
        if isinstance(images, list | tuple) and all(isinstance(i, str | Path) for i in images):
            images = self._files(images, shape)
        from keras_emr_serving.client.images import checked

        return self.run(signature, {name: checked("images", images, shape)})

    def robust(self, images):
        """As :meth:`predict`, and how far each image is from being taken for something else.

        Returns:
            Besides: ``margin``, ``effective_margin_l2`` and ``effective_margin_linf`` (N,)
            float32, ``trusted`` (N,) bool.
        """
        return self.predict(images, "robust")

    def _files(self, files, shape):
        from keras_emr_serving.client.images import read_images

        found = [image for file in files for _, image in read_images(file, shape)]
        if len({image.shape for image in found}) > 1:
            raise UserError(
                "images of several sizes for a model that takes any. Received: "
                f"{sorted({image.shape for image in found})[:3]}. Expected one size at a time."
            )
        return np.stack(found) if found else np.zeros((0, *(side or 1 for side in shape)))

    def run(self, signature, inputs):
        """Run any signature, in batches.

        Args:
            signature: name.
            inputs: name -> array or list of ``bytes``, with as many rows each.

        Returns:
            Outputs by name; the rows first. Strings come as object arrays.
        """
        described = self.signature(signature)
        if set(inputs) != set(described.inputs):
            raise UserError(
                f"inputs of signature {signature!r}. Received: {', '.join(inputs) or 'none'}. "
                f"Expected {', '.join(described.inputs)}."
            )
        rows = {len(value) for value in inputs.values()}
        if len(rows) != 1 or rows == {0}:
            raise UserError(
                f"inputs: nothing to send, or of different lengths. Received: {sorted(rows)} rows. "
                "Expected as many of each, at least one."
            )
        count = rows.pop()
        size = self._rows_at_a_time(inputs)
        parts = []
        for begin in range(0, count, size):
            part = {name: value[begin : begin + size] for name, value in inputs.items()}
            parts.append(self._one(signature, described, part, min(size, count - begin)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _one(self, signature, described, inputs, count):
        outputs = self.retry.call(lambda: self._transport.predict(signature, described, inputs))
        for name, value in outputs.items():
            if value.ndim == 0 or len(value) != count:
                message = f"{name} of shape {value.shape} for {count} rows."
                raise ClientError(None, message, self.url, retryable=False)
        return outputs

    def _rows_at_a_time(self, inputs):
        if self.batch_size is not None:
            return self.batch_size
        largest = max(map(self._row_bytes, inputs.values()))
        return max(1, min(_MOST_IMAGES, _MOST_BYTES // max(1, largest)))

    def _row_bytes(self, value):
        if isinstance(value, np.ndarray):
            return value[0].size * self._transport.number_bytes
        return max(map(len, value)) * 4 // 3

    def close(self):
        """Close the connections."""
        self._transport.close()

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.close()
