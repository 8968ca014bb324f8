"""Sets of defaults of ``keras-emr train``: ``--preset NAME``."""

# Values for settings that no flag, variable or config file gives; a function makes its value of all
# the others, ``None`` for the default.
PRESETS = {
    "none": {},
    # Fewer and longer attack steps, a rate that rises and falls, averaged weights, and for a
    # learned maximizer a quarter of each batch to learn from. `benchmarks/fast_recipes.py` measures
    # what that costs.
    "fast": {
        "steps": 4,
        "epochs": 15,
        "lr_schedule": "cyclic",
        "learning_rate": lambda values: 0.003 if values["optimizer"] == "adam" else None,
        "averaging": "ema",
        "averaging_decay": 0.98,
        "learn_share": 0.25,
    },
}
