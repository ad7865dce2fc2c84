"""`python mlflow_model.py model.keras FOLDER`: a model as `mlflow models serve` wants it. Source: MLflow's "Keras within MLflow"."""

import sys

import keras
import mlflow

mlflow.keras.save_model(keras.saving.load_model(sys.argv[1]), sys.argv[2], pip_requirements=[])
