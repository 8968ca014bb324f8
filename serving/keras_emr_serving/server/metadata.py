"""The JSON of model status and model metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable

_OPTIONS = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}


def status_text(versions: Iterable[tuple]) -> str:
    """``versions``: (number, state, error) as :meth:`Manager.status` gives them."""
    rows = [
        {
            "version": str(number),
            "state": state,
            "status": {
                "error_code": error.code if error else "OK",
                "error_message": error.message if error else "",
            },
        }
        for number, state, error in versions
    ]
    return json.dumps({"model_version_status": rows}, indent=1) + "\n"


def metadata_text(name: str, version) -> str:
    """Name, version and signatures of a loaded :class:`Version`."""
    from google.protobuf.json_format import MessageToDict

    spec = {"name": name, "signature_name": "", "version": str(version.number)}
    signatures = MessageToDict(signature_map(version), **_OPTIONS)
    content = {"model_spec": spec, "metadata": {"signature_def": signatures}}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def signature_map(version):
    """A ``SignatureDefMap`` of a loaded version's signatures."""
    from tensorflow_serving.apis.get_model_metadata_pb2 import SignatureDefMap

    message = SignatureDefMap()
    for key, signature in version.servable.signatures.items():
        message.signature_def[key].CopyFrom(signature)
    return message
