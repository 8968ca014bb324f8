"""A development server that answers as TensorFlow Serving does. Production is TF Serving itself."""
