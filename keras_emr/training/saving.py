"""How a classifier is saved with everything that training goes on from."""

from __future__ import annotations

import keras
from keras import ops

# Loading a saved classifier finds them by their registered names: they must have been imported.
from keras_emr.training import learning_rates as _learning_rates  # noqa: F401
from keras_emr.training import optimizers as _optimizers  # noqa: F401


class Saving:
    """Configuration, compilation and the state of the noise of :class:`RobustClassifier`."""

    def get_compile_config(self):
        config = super().get_compile_config()
        if config and self.maximizer_optimizer is not None:
            optimizer = keras.saving.serialize_keras_object(self.maximizer_optimizer)
            config = {**config, "maximizer_optimizer": optimizer}
        return config

    def compile_from_config(self, config):
        # Keras skips compilation on loading where `compile` is overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    # Keras keeps the state of seed generators out of weight files; without it a resumed run
    # would repeat the noise of the first epochs.
    def _seed_states(self):
        weights = {id(v) for v in self.weights}
        return [v for v in super().non_trainable_variables if id(v) not in weights]

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for i, variable in enumerate(self._seed_states()):
            store[f"seed_{i}"] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        for i, variable in enumerate(self._seed_states()):
            variable.assign(store[f"seed_{i}"])
        super().load_own_variables(
            {key: store[key] for key in store.keys() if not key.startswith("seed_")}
        )

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "model": serialize(self.model),
            "defense": serialize(self.defense),
            "attack": serialize(self._given["attack"]),
            "regularizers": [serialize(r) for r in self._given["regularizers"]],
            "eval_attack": serialize(self._given["eval_attack"]),
            "attack_mode": self.attack_mode,
            "attack_precision": self.attack_precision,
            "maximizer_update": self.maximizer_update,
            "averaging": serialize(self.averaging),
            "weight_perturbation": serialize(self.weight_perturbation),
            "epsilon_schedule": serialize(self.epsilon_schedule),
            "teacher": serialize(self.teacher),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        parts = ("averaging", "weight_perturbation", "epsilon_schedule", "teacher")
        for key in ("model", "defense", "attack", "eval_attack", *parts):
            config[key] = deserialize(config.get(key))
        config["regularizers"] = [deserialize(r) for r in config["regularizers"]]
        return cls(**config)
