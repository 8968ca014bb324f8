"""How commands reach a served model."""

from __future__ import annotations


def open_client(url, grpc, options):
    """A :class:`keras_emr_serving.Client`.

    Args:
        url: text.
        grpc: whether gRPC was asked for, whatever the URL says.
        options: of the client.
    """
    from keras_emr_serving.client.client import Client

    if not grpc and not url.strip().startswith("grpc"):
        return Client(url, **options)
    # gRPC's stubs import TensorFlow, which would greet on stderr.
    from keras_emr_cli.session import quiet_tensorflow

    with quiet_tensorflow():
        return Client(url, protocol="grpc", **options)
