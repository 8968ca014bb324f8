"""Asks a server with ``ovmsclient``: prints what it says as JSON.

In an environment of its own, which has nothing of this package:
``python ovmsclient_worker.py grpc|http ADDRESS IMAGES.npy``.
"""

import json
import sys

import numpy as np
import ovmsclient


def main(protocol, address, file):
    make = {"grpc": ovmsclient.make_grpc_client, "http": ovmsclient.make_http_client}[protocol]
    client, images = make(address), np.load(file)
    told = {
        "status": client.get_model_status("m", 1),
        "metadata": client.get_model_metadata("m", 2),
        "predictions": {
            version: {
                name: np.asarray(values).tolist()
                for name, values in client.predict({"image": images}, "m", version).items()
            }
            for version in (1, 2)
        },
    }
    for wrong, arguments in (
        ("model", ({"image": images}, "zz", 1)),
        ("version", ({"image": images}, "m", 3)),
        ("shape", ({"image": images[:, 1:]}, "m", 1)),
        ("input", ({"picture": images}, "m", 1)),
    ):
        try:
            client.predict(*arguments)
        except Exception as error:
            told[f"wrong {wrong}"] = [type(error).__name__, str(error)]
    print(json.dumps(told, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
