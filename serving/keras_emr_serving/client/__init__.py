"""A client of TensorFlow Serving: REST without TensorFlow, gRPC where that is wanted."""
