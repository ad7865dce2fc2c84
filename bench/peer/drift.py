"""Another detector on streams of `bench.drift`: `python drift.py evidently streams.npz WINDOW`, in its own interpreter.

Prints for each case the image of each stream's first alarm, or null, as JSON. Columns: five figures, the class, unknown."""

import json
import sys
import warnings

import numpy as np

warnings.filterwarnings("ignore")


def evidently(reference: np.ndarray, stream: np.ndarray, window: int) -> "int | None":
    "The preset for data drift with its defaults, on windows."
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    columns = ["brightness", "contrast", "sharpness", "confidence", "ood_score", "label", "unknown"]
    about = DataDefinition(numerical_columns=columns[:5], categorical_columns=columns[5:])

    def dataset(rows: np.ndarray) -> Dataset:
        table = (
            pd.DataFrame(rows, columns=columns)
            .astype({"label": int, "unknown": int})
            .astype({"label": str, "unknown": str})
        )
        return Dataset.from_pandas(table, data_definition=about)

    before = dataset(reference)
    for end in range(window, len(stream) + 1, window):
        result = Report([DataDriftPreset()]).run(dataset(stream[end - window : end]), before).dict()
        counts = next(
            m["value"]
            for m in result["metrics"]
            if "DriftedColumnsCount" in str(m.get("metric_id") or m.get("metric_name"))
        )
        if counts["share"] >= 0.5:  # its default for a data set
            return end
    return None


def main() -> None:
    kind, path, window = sys.argv[1:]
    arrays, result = np.load(path), {}
    for key in arrays.files:
        name, number, part = key.split("|")
        if part == "reference":
            alarm = globals()[kind](arrays[key], arrays[f"{name}|{number}|stream"], int(window))
            result.setdefault(name, []).append(alarm)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
