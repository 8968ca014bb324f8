"""KerasTuner's chief, with leases: it notices that a worker is gone, and gives its trial away.

KerasTuner's own chief never ends when its workers do, and forgets who runs what. The service is
the same, so that messages and trials are KerasTuner's; a worker says with each call who it is.
"""

from __future__ import annotations

import threading
import time
from concurrent import futures

from keras_emr.errors import UserError

BEAT = 2.0  # seconds between two signs of life of a worker
PATIENCE = 20.0  # a worker that cannot reach the chief for so long ends
LEASE = 30.0  # the chief counts a silent worker as gone; longer, so that none runs on by then
WHO, SESSION, SEARCH = "tuner-id", "session", "search-id"


class Chief:
    """Serves a study to workers.

    Args:
        study: :class:`keras_emr.tuning.kerastuner.KerasTunerStudy`.
        host, port: to listen on; port 0: any free one. ``port`` then tells which.
        search: name of this search: a worker of another one is told so.
        on_end: called with the name of every trial that ends.
    """

    def __init__(self, study, host, port, search, on_end=None):
        self.study, self.search, self.on_end = study, search, on_end
        self.lock = threading.Lock()
        self.heard = {}  # worker -> (session, when)
        self.seen = set()  # every worker that ever asked
        self.over = False
        self._server = _server(self, host, port)
        self.port = self._server.port

    def note(self, worker, session):
        """``worker`` gave a sign of life; an error's text if another one has its name."""
        with self.lock:
            known = self.heard.get(worker)
            now = time.monotonic()
            if known and known[0] != session and now - known[1] < LEASE:
                return f"a worker called {worker} is at work already"
            self.heard[worker] = (session, now)
            self.seen.add(worker)
            return None

    def alive(self):
        """Names of the workers that gave a sign of life lately."""
        with self.lock:
            now = time.monotonic()
            return {name for name, (_, when) in self.heard.items() if now - when < LEASE}

    def lapsed(self):
        """Forget the silent workers and give their trials back: ``{worker: trial or None}``."""
        gone = set(self.heard) - self.alive()
        return {worker: self.gone(worker) for worker in gone}

    def gone(self, worker):
        """``worker`` has ended: give its trial back; its name, or ``None``."""
        with self.lock:
            self.heard.pop(worker, None)
        return self.study.release(worker)

    def stop(self):
        self._server.stop(None)


def _server(chief, host, port):
    import grpc
    from keras_tuner import HyperParameters
    from keras_tuner.engine.trial import Trial as TheirTrial
    from keras_tuner.src import protos
    from keras_tuner.src.distribute.oracle_chief import OracleServicer

    service = protos.get_service()

    class Servicer(OracleServicer):
        """KerasTuner's, of a study that other threads supervise."""

        def _note(self, context, worker=None):
            about = dict(context.invocation_metadata())
            worker = worker or about.get(WHO)
            if about.get(SEARCH, chief.search) != chief.search:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, "the chief there runs another search"
                )
            if worker and (problem := chief.note(worker, about.get(SESSION))):
                context.abort(grpc.StatusCode.ALREADY_EXISTS, problem)
            return worker

        def GetSpace(self, request, context):
            """A sign of life: the space itself is in the search's folder."""
            self._note(context)
            return service.GetSpaceResponse()

        def CreateTrial(self, request, context):
            worker = self._note(context, request.tuner_id)
            with chief.study.lock:
                trial = self.oracle.create_trial(worker)
                if trial.status == "STOPPED" and chief.study.waiting:
                    trial.status = "IDLE"  # another worker may yet leave its trial behind
            if trial.status == "STOPPED":
                chief.over = True  # before nobody is left, which would be an error
                with chief.lock:
                    chief.heard.pop(worker, None)
            # Without the space, on whose conditions KerasTuner 1.4.8 prints to stdout.
            told = HyperParameters()
            told.values = dict(trial.hyperparameters.values)
            about = TheirTrial(told, trial.trial_id, trial.status)
            return service.CreateTrialResponse(trial=about.to_proto())

        def EndTrial(self, request, context):
            worker = self._note(context)
            number = int(request.trial.trial_id)
            owner = chief.study.owner(number)
            if owner is not None and worker is not None and owner != worker:
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"the trial was given to {owner}"
                )
            proto = request.trial
            score = proto.score.value if proto.HasField("score") else None
            if owner is not None:
                chief.study.end(number, score, proto.score.step)
                if chief.on_end:
                    chief.on_end(f"{number:04d}")
            return service.EndTrialResponse()

    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.so_reuseport", 0)]
    )
    protos.get_service_grpc().add_OracleServicer_to_server(Servicer(chief.study.oracle), server)
    try:
        server.port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        server.port = 0
    if not server.port:
        raise UserError(
            f"--chief: cannot listen there. Received: {host}:{port}. Is the address this machine's,"
            " and the port free?"
        )
    server.start()
    return server
