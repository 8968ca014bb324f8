"""A worker's end of KerasTuner's chief: a study like any other, that keeps its lease."""

from __future__ import annotations

import threading
import time
import uuid

from keras_emr.tuning.chief import BEAT, PATIENCE, SEARCH, SESSION, WHO


class ChiefLost(RuntimeError):
    """The chief cannot be reached, or has given this worker's trial away; one line."""


class RemoteStudy:
    """The study of the chief at ``address`` (see :class:`keras_emr.tuning.trials.Study`).

    Args:
        address: ``HOST:PORT``.
        worker: this worker's name, its own among all workers.
        search: name of the search in its folder.
        lost: called with one line, from another thread, when the lease cannot be kept: the trial
            must end before another worker takes it up.
        patience: seconds to wait for the chief.

    Raises:
        ChiefLost: it does not answer.
    """

    def __init__(self, address, worker, search, lost, patience=PATIENCE):
        import grpc
        from keras_tuner.src import protos

        self.address, self.worker, self.patience = address, worker, patience
        self._about = ((WHO, worker), (SESSION, uuid.uuid4().hex), (SEARCH, search))
        self._messages, self._grpc = protos.get_service(), grpc
        self._channel = grpc.insecure_channel(address)
        self._stub = protos.get_service_grpc().OracleStub(self._channel)
        self._lost, self._closed = lost, threading.Event()
        self._call("GetSpace", "GetSpaceRequest")
        threading.Thread(target=self._keep, daemon=True).start()

    def ask(self):
        from keras_tuner.engine.trial import Trial as TheirTrial

        from keras_emr.tuning.kerastuner import as_trial

        while not self._closed.is_set():
            request = {"tuner_id": self.worker}
            answer = self._call("CreateTrial", "CreateTrialRequest", **request)
            trial = TheirTrial.from_proto(answer.trial)
            if trial.status == "RUNNING":
                return as_trial(trial)
            if trial.status != "IDLE":
                return None
            time.sleep(0.5)
        raise ChiefLost(f"no answer from the chief at {self.address}")

    def tell(self, trial, result):
        from keras_tuner.src import protos

        kind = protos.get_proto().Trial
        score = {}
        if result.ok:
            score["score"] = kind.Score(value=result.score, step=result.epoch or 0)
        self._call("EndTrial", "EndTrialRequest", trial=kind(trial_id=trial.name, **score))

    def close(self):
        self._closed.set()
        self._channel.close()

    def _call(self, method, message, patience=None, **fields):
        request = getattr(self._messages, message)(**fields)
        seconds = patience or self.patience
        try:
            return getattr(self._stub, method)(
                request, metadata=self._about, timeout=seconds, wait_for_ready=True
            )
        except self._grpc.RpcError as error:
            codes = self._grpc.StatusCode
            if error.code() in (codes.DEADLINE_EXCEEDED, codes.UNAVAILABLE, codes.CANCELLED):
                text = f"no answer from the chief at {self.address} for {seconds:g} s"
            else:
                text = f"the chief at {self.address} refuses: {error.details()}"
            raise ChiefLost(text) from None

    def _keep(self):
        while not self._closed.wait(BEAT):
            try:
                self._call("GetSpace", "GetSpaceRequest")
            except ChiefLost as error:
                if not self._closed.is_set():
                    self._closed.set()
                    self._lost(str(error))
                return
