"""Test settings that must be in place before a backend is imported."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Lets the float64 references run in float64 on JAX; everything else asks for float32 by name.
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# As the command line has it: on every processor. The recorded answers of a server are oneDNN's.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
