"""The plain way to a demo: `gr.Interface` around the Keras model. Source: https://www.gradio.app/guides, "Quickstart"."""

import os
import sys

import gradio
import keras
import numpy as np

model = keras.saving.load_model(os.environ["PEER_MODEL"])
classes = os.environ["PEER_CLASSES"].split(",")


def predict(image: np.ndarray) -> dict[str, float]:
    side = model.input_shape[1]
    pixels = keras.ops.image.resize(image[..., :3].astype("float32"), (side, side))
    probabilities = keras.ops.softmax(model.predict(pixels[None], verbose=0))[0]
    return dict(zip(classes, map(float, probabilities), strict=True))


page = gradio.Interface(predict, gradio.Image(), gradio.Label(num_top_classes=3), api_name="predict")
page.launch(server_name="127.0.0.1", server_port=int(sys.argv[sys.argv.index("--port") + 1]))
