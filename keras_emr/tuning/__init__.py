"""Searches over hyper-parameters for robust accuracy.

Who proposes the trials is one object with ``ask`` and ``tell`` (:class:`trials.Study`):
KerasTuner's oracles in :mod:`kerastuner`, the same behind its chief in :mod:`worker`. Everything
else, from running a trial to ranking them, does not know it.
"""
