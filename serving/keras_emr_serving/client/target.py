"""A served model as what attacks ask. Imports keras."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from keras_emr.errors import UserError
from keras_emr.evaluation.target import FunctionTarget


class ServedTarget(FunctionTarget):
    """A model behind a server: logits, or probabilities where it gives no logits.

    Args:
        client: :class:`Client`. Which version is asked should not change on the way: give it a
            version.
        batch_size: images at a time; the client may split them further.

    Raises:
        UserError: the model gives neither.
        ClientError: see :class:`Client`.
    """

    def __init__(self, client, batch_size=256):
        outputs = client.signature().outputs
        name = next((n for n in ("logits", "probabilities") if n in outputs), None)
        shape = name and outputs[name].shape
        if not shape or len(shape) != 2 or shape[1] is None:
            raise UserError(
                f"url: not a classifier that can be attacked. Received: outputs "
                f"{', '.join(outputs)}. Expected logits or probabilities (N, K)."
            )
        super().__init__(lambda x: client.predict(x)[name], shape[1], batch_size)
        self.client = client

    def fingerprint(self):
        """SHA-256 of the model's name, version and signatures.

        Not of the host: a server that comes back elsewhere serves the same model.
        """
        described = json.dumps(asdict(self.client.metadata()), sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()
