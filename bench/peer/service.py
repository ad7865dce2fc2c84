"""The guide's own way of serving, in plain form: BentoML with the Keras model.

Source: https://mlops.swiss-ai-center.ch, "Serve the model with BentoML"."""

import os
from typing import Annotated

import bentoml
import keras
import numpy as np
from bentoml.validators import ContentType
from PIL.Image import Image


@bentoml.service(name="celestial_bodies_classifier")
class CelestialBodiesClassifier:
    def __init__(self) -> None:
        self.model = keras.saving.load_model(os.environ["PEER_MODEL"])
        self.classes = os.environ["PEER_CLASSES"].split(",")

    @bentoml.api()
    def predict(self, image: Annotated[Image, ContentType("image/jpeg")]) -> dict:
        size = self.model.input_shape[1:3]
        pixels = np.asarray(image.convert("RGB").resize(size))[None]
        logits = self.model.predict(pixels, verbose=0)[0]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        return {
            "prediction": self.classes[int(np.argmax(probabilities))],
            "probabilities": dict(zip(self.classes, probabilities.tolist(), strict=True)),
        }
