"""From a trained folder to labels: an adapter's run, one of its checkpoints, or an export of any kind."""

import loralib


def label(folder: str, texts: list[str | tuple[str, str]]) -> list[str | float]:
    model, tokenizer = loralib.load(folder)
    predictions = loralib.predict(model, texts, tokenizer)
    for text, prediction in zip(texts, predictions, strict=True):
        print(text, prediction.label, prediction.scores)
    return [prediction.label for prediction in predictions]
