"""Throughput and latency of ``keras-emr serve`` on loopback, beside a bare Session call.

    python benchmarks/serving_load.py STORE --model NAME [--seconds 3] [--rounds 3] [--clients 4]

The same images go through TensorFlow's Session in a process of its own (the limit) and from a
client process through the server over gRPC and REST, without and with dynamic batching, one after
the other in every round. All numbers are ratios: images per second over the limit's, as many
callers on both sides, and the latency of one client over the median of a bare call. Last, the
first request after a start over the median of those that follow, for fresh servers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

SIGNATURES, BATCHES = ("serving_default", "robust"), (1, 32)
BATCHING = """max_batch_size { value: 64 } batch_timeout_micros { value: 1000 }
num_batch_threads { value: 2 } max_enqueued_batches { value: 100 }"""


class Worker:
    """A process of this file that answers jobs, a line of JSON each."""

    def __init__(self, kind, **settings):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({"kind": kind, **settings})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()  # ready

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker has ended; run it by hand with --worker to see why")
        return json.loads(line)

    def __call__(self, **job):
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class ServerProcess:
    """``keras-emr serve`` on free ports."""

    def __init__(self, store, *options):
        command = ["-m", "keras_emr_cli.main", "serve", str(store), "--quiet"]
        self._process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", "--rest-api-port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        told = ""
        while "Ctrl-C" not in told:
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {told}")
            told += line
        self.rest = int(re.search(r"REST: \S+:(\d+)/v1", told)[1])
        self.grpc = int(re.search(r"gRPC: \S+:(\d+)", told)[1])

    def close(self):
        self._process.terminate()
        self._process.wait()


# Inside the workers.


def session_calls(folder):
    """``call(signature, images)`` by TensorFlow's Session alone."""
    import tensorflow as tf

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
    ready = {}
    for name in SIGNATURES:
        found = meta.signature_def[name]
        fetches = [output.name for output in found.outputs.values()]
        ready[name] = session.make_callable(fetches, [found.inputs["image"].name])

    def prepare(protocol, signature, images):
        return lambda: ready[signature](images)

    return prepare


def client_calls(model, grpc_port, rest_port):
    """``call(signature, images)`` over gRPC or REST; the requests are made beforehand."""
    import grpc
    import requests
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    channel = grpc.insecure_channel(
        f"127.0.0.1:{grpc_port}", options=[("grpc.max_receive_message_length", -1)]
    )
    grpc.channel_ready_future(channel).result(30)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    url = f"http://127.0.0.1:{rest_port}/v1/models/{model}:predict"

    def prepare(protocol, signature, images):
        if protocol == "grpc":
            request = predict_pb2.PredictRequest()
            request.model_spec.name, request.model_spec.signature_name = model, signature
            request.inputs["image"].CopyFrom(tf.make_tensor_proto(images))
            return lambda: stub.Predict(request, timeout=60)
        body = json.dumps({"signature_name": signature, "instances": images.tolist()})
        http = requests.Session()

        def post():
            answer = http.post(url, data=body, timeout=60)
            answer.raise_for_status()

        return post

    return prepare


def work(settings):
    kind = settings.pop("kind")
    prepare = (session_calls if kind == "session" else client_calls)(**settings)
    print("true", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        images = np.random.default_rng(0).uniform(size=(job["batch"], *job["shape"]))
        images = images.astype("float32")
        calls = [prepare(job["protocol"], job["signature"], images) for _ in range(job["clients"])]
        print(json.dumps(measure(calls, job["seconds"])), flush=True)


def measure(calls, seconds):
    """Calls per second by all threads together, and every latency."""
    latencies = [[] for _ in calls]
    failed = []
    until = time.perf_counter() + seconds

    def repeat(call, mine):
        try:
            while not mine or time.perf_counter() < until:
                begin = time.perf_counter()
                call()
                mine.append(time.perf_counter() - begin)
        except Exception as error:
            failed.append(repr(error))

    threads = [
        threading.Thread(target=repeat, args=pair) for pair in zip(calls, latencies, strict=True)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    every = [one for mine in latencies for one in mine]
    return {"rate": len(every) / elapsed, "latencies": every, "failed": failed}


# The benchmark.


def run(options):
    folder = newest(options.store / options.model)
    card = json.loads((folder / "assets.extra" / "keras_emr.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        batching = Path(scratch) / "batching.config"
        batching.write_text(BATCHING)
        flags = ("--enable-batching", "--batching-parameters-file", str(batching))
        table = steady(options, folder, card["image_shape"], flags)
        first = first_requests(options, card["image_shape"])
    return {"clients": options.clients, "rounds": options.rounds, "steady": table, "first": first}


def newest(folder):
    versions = [path for path in folder.iterdir() if path.name.isdigit()]
    return max(versions, key=lambda path: int(path.name))


def steady(options, folder, shape, flags):
    servers = {
        "": ServerProcess(options.store),
        " + batching": ServerProcess(options.store, *flags),
    }
    ways = {"Session": (Worker("session", folder=str(folder)), "")}
    for name, server in servers.items():
        client = Worker("client", model=options.model, grpc_port=server.grpc, rest_port=server.rest)
        ways |= {f"{p}{name}": (client, p) for p in ("grpc", "rest")}
    rows = []
    for signature in SIGNATURES:
        for batch in BATCHES:
            job = {"signature": signature, "batch": batch, "shape": shape}
            found = {way: {"rate": [], "latencies": []} for way in ways}
            for turn in range(options.rounds + 1):  # the first warms up
                seconds = options.seconds if turn else 0.5
                for way, (worker, protocol) in ways.items():
                    many, one = (
                        worker(**job, protocol=protocol, clients=n, seconds=seconds)
                        for n in (options.clients, 1)
                    )
                    if many["failed"] or one["failed"]:
                        raise SystemExit(f"{way}: {(many['failed'] + one['failed'])[0]}")
                    if turn:
                        found[way]["rate"].append(many["rate"])
                        found[way]["latencies"].append(np.percentile(one["latencies"], (50, 99)))
            rows += summarize(signature, batch, found)
    for worker in {id(w): w for w, _ in ways.values()}.values():
        worker.close()
    for server in servers.values():
        server.close()
    return rows


def summarize(signature, batch, found):
    """Medians over the rounds, of ratios within a round."""
    limit = found["Session"]
    rows = []
    for way, mine in found.items():
        rates = np.array(mine["rate"]) / np.array(limit["rate"])
        latencies = np.array(mine["latencies"]) / np.array(limit["latencies"])[:, :1]
        p50, p99 = np.median(latencies, axis=0)
        rows.append(
            {
                "signature": signature,
                "batch": batch,
                "way": way,
                "throughput": float(np.median(rates)),
                "throughput_range": [float(rates.min()), float(rates.max())],
                "p50": float(p50),
                "p99": float(p99),
            }
        )
    return rows


def first_requests(options, shape):
    rows = []
    for signature in SIGNATURES:
        for batch in BATCHES:
            ratios = []
            for _ in range(options.starts):
                server = ServerProcess(options.store)
                client = Worker(
                    "client", model=options.model, grpc_port=server.grpc, rest_port=server.rest
                )
                job = {"signature": signature, "batch": batch, "shape": shape, "clients": 1}
                told = client(**job, protocol="grpc", seconds=2)["latencies"]
                ratios.append(told[0] / float(np.median(told[1:])))
                client.close()
                server.close()
            rows.append({"signature": signature, "batch": batch, "first_over_p50": ratios})
    return rows


def show(result):
    print("| signature | batch | way | throughput / limit | p50 / bare call | p99 / bare call |")
    print("|---|---|---|---|---|---|")
    for row in result["steady"]:
        low, high = row["throughput_range"]
        print(
            f"| {row['signature']} | {row['batch']} | {row['way']} | {row['throughput']:.2f} "
            f"({low:.2f} to {high:.2f}) | {row['p50']:.2f} | {row['p99']:.2f} |"
        )
    for row in result["first"]:
        ratios = ", ".join(f"{ratio:.1f}" for ratio in row["first_over_p50"])
        print(f"first request / p50, {row['signature']}, batch {row['batch']}: {ratios}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--starts", type=int, default=2, help="fresh servers for first requests")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(json.loads(options.worker))
    if not (options.store and options.model):
        parser.error("expected STORE and --model")
    result = run(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
