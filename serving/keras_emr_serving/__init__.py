"""Export to TensorFlow Serving, a development server that behaves like it, and a client."""
