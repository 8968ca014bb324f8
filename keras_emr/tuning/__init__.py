"""Searches over hyper-parameters for robust accuracy.

Who proposes the trials is one object with ``ask`` and ``tell`` (:class:`trials.Study`):
KerasTuner's oracles in :mod:`kerastuner`, the same behind its chief in :mod:`worker`. Everything
else, from running a trial to ranking them, does not know it.
"""

SEARCHES = ("random", "bayesian", "hyperband")
OBJECTIVES = (
    "val_robust_accuracy",
    "val_accuracy",
    "val_share_above_epsilon",
    "val_effective_margin_linf",
    "val_effective_margin_l2",
)
