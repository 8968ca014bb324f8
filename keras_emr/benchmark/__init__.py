"""How long training steps take on this machine, and how far from the least possible that is."""

# What `keras-emr bench` can time; here, for the command line's help imports no keras.
JOBS = (
    "standard",
    "at",
    "trades",
    "mart",
    "at-emr",
    "trades-emr",
    "mart-emr",
    "at-lstm",
    "trades-lstm",
)
