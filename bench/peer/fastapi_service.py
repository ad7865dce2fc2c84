"""The plain way to a service: FastAPI around the Keras model. Source: FastAPI's documentation, "Request Files"."""

import io
import os
import sys

import keras
import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

model = keras.saving.load_model(os.environ["PEER_MODEL"])
classes = os.environ["PEER_CLASSES"].split(",")
app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "alive"}


@app.post("/predict")
def predict(image: UploadFile) -> dict:
    side = model.input_shape[1:3]
    pixels = np.asarray(Image.open(io.BytesIO(image.file.read())).convert("RGB").resize(side))[None]
    probabilities = keras.ops.softmax(model.predict(pixels, verbose=0))[0]
    values = dict(zip(classes, map(float, probabilities), strict=True))
    return {"label": max(values, key=values.get), "probabilities": values}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), log_level="warning")
