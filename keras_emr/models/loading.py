"""Classifiers from files."""

from keras_emr.errors import UserError


def load_model(path):
    """The classifier in a .keras file; that inside, if it is a saved RobustClassifier.

    Raises:
        UserError: the file cannot be loaded.
    """
    import keras

    from keras_emr.training.classifier import RobustClassifier

    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged archive can fail in any way
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot load the model: {reason[0] if reason else type(error).__name__} "
            f"Received: {str(path)!r}. Expected a .keras file."
        ) from None
    return model.model if isinstance(model, RobustClassifier) else model
