"""``keras-emr predict``: ask a served model about image files."""

from __future__ import annotations

import json
import math

import click

from keras_emr.errors import UserError

EXIT_UNTRUSTED = 4
_MEASURES = ("margin", "effective_margin_l2", "effective_margin_linf")


@click.command(name="predict")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "--url",
    required=True,
    help="http://HOST:8501/v1/models/NAME, and /versions/N or /labels/L; https, grpc or grpcs.",
)
@click.option("--grpc", is_flag=True, help="gRPC at that host and port, whatever the URL says.")
@click.option(
    "--top", type=click.IntRange(1), default=1, show_default=True, help="Labels for an image."
)
@click.option(
    "--reject-untrusted", is_flag=True, help="Exit code 4 if the model does not trust an answer."
)
@click.option(
    "--labels",
    metavar="FILE",
    help="Names of the classes: a line each, or JSON.  [default: the model's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON.")
@click.option("--batch-size", type=click.IntRange(1), help="Images in a request.  [default: 256]")
@click.option(
    "--timeout",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for a request.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="How often to ask again a server that is away or busy.",
)
@click.option("--ca", metavar="FILE", help="PEM file of the certificates to trust.")
@click.option("--certificate", metavar="FILE", help="PEM file of this client's certificate.")
@click.option("--key", metavar="FILE", help="PEM file of its key.")
def command(images, url, grpc, top, reject_untrusted, labels, as_json, **options):
    """Classify image files, or arrays in .npy and .npz files, with a served model.

    Pictures of any size and mode become what the model takes. The margins tell how far an image is
    from being taken for something else; a model that keras-emr exported says by them whether its
    answer is to be trusted. Exit code 4: with --reject-untrusted, for an answer that is not.
    """
    from keras_emr_cli.main import EXIT_FAILURE, EXIT_INVALID, fail
    from keras_emr_cli.served import open_client
    from keras_emr_serving.client.errors import ClientError

    names = None if labels is None else _read_labels(labels)
    try:
        with open_client(url, grpc, options) as client:
            answers = _Answers(client, names, top, reject_untrusted)
            rows = answers.rows(images)
    except ClientError as error:
        return fail(error, EXIT_INVALID if error.mistake else EXIT_FAILURE)
    if as_json:
        click.echo(json.dumps(answers.report(rows), indent=2))
    else:
        _show(answers, rows, top)
    doubtful = [row for row in rows if row["trusted"] is False]
    if reject_untrusted and doubtful:
        files = ", ".join(_place(row) for row in doubtful[:3])
        more = ", ..." if len(doubtful) > 3 else ""
        text = (
            f"--reject-untrusted: the model does not trust its answer for {len(doubtful)} of "
            f"{len(rows)} images. Received: {files}{more}. Expected effective margins above its "
            "threshold."
        )
        return fail(text, EXIT_UNTRUSTED)


class _Answers:
    """What the model says about files.

    Args:
        client: :class:`Client`.
        names: of the classes, or ``None``: as the model has them.
        top: labels for an image.
        margins: whether the model must tell them.
    """

    def __init__(self, client, names, top, margins):
        self.client, self.top, self._names = client, top, names
        signatures = client.metadata().signatures
        self.signature = "robust" if "robust" in signatures else "serving_default"
        if margins and "trusted" not in client.signature(self.signature).outputs:
            raise UserError(
                f"--reject-untrusted: the model does not say what is to be trusted. Received: "
                f"signatures {', '.join(signatures)}. Expected robust, as keras-emr export writes."
            )
        outputs = client.signature(self.signature).outputs
        if "probabilities" not in outputs:
            raise UserError(
                f"--url: not a classifier of keras-emr export. Received: outputs "
                f"{', '.join(outputs)}. Expected probabilities among them."
            )
        self.shape = client.image_shape(self.signature)

    def rows(self, files):
        """A dictionary for each image. Files are read and sent in portions."""
        import numpy as np

        from keras_emr_serving.client.images import read_images

        size = self.client.batch_size or 256
        rows, places, waiting = [], [], []
        for number, file in enumerate(files):
            for index, image in read_images(file, self.shape):
                places.append((file, index))
                waiting.append(image)
            last = number == len(files) - 1
            # Images of one size can go together.
            mixed = len({image.shape for image in waiting}) > 1
            if mixed:
                raise UserError(
                    "images of several sizes for a model that takes any. Received: "
                    f"{str(file)!r} beside others. Expected one size at a time."
                )
            if waiting and (last or len(waiting) >= size):
                rows += self._ask(places, np.stack(waiting))
                places, waiting = [], []
        return rows

    def _ask(self, places, images):
        outputs = self.client.predict(images, self.signature)
        probabilities = outputs["probabilities"]
        names = self._labels(probabilities.shape[1])
        best = (-probabilities).argsort(axis=1, kind="stable")[:, : self.top]
        rows = []
        for i, (file, index) in enumerate(places):
            top = [
                {"class": int(k), "label": names[k], "probability": float(probabilities[i, k])}
                for k in best[i]
            ]
            trusted = bool(outputs["trusted"][i]) if "trusted" in outputs else None
            measures = {
                name: float(outputs[name][i]) if name in outputs else None for name in _MEASURES
            }
            rows.append({"file": file, "index": index, **top[0], "top": top, **measures})
            rows[-1]["trusted"] = trusted
        return rows

    def _labels(self, classes):
        if self._names is None:
            self._names = self.client.labels(self.signature) or [str(k) for k in range(classes)]
        if len(self._names) != classes:
            raise UserError(
                f"--labels: not as many names as the model has classes. Received: "
                f"{len(self._names)}. Expected {classes}."
            )
        return self._names

    def report(self, rows):
        """For ``--json``."""
        served = self.client.metadata()
        return {
            "url": self.client.url,
            "model": served.name,
            "version": served.version,
            "signature": self.signature,
            "images": _plain(rows),
        }


def _plain(value):
    """What is not finite, an infinite margin for instance, as ``None``: JSON has no such number."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place(row):
    return row["file"] if row["index"] is None else f"{row['file']}[{row['index']}]"


def _show(answers, rows, top):
    from rich.markup import escape

    from keras_emr_cli.tables import print_table

    columns = ["file", "label", "probability", *(["next"] if top > 1 else [])]
    measured = [name for name in _MEASURES if rows and rows[0][name] is not None]
    judged = bool(rows) and rows[0]["trusted"] is not None
    titles = {
        "margin": "margin",
        "effective_margin_l2": "eff. margin L2",
        "effective_margin_linf": "eff. margin Linf",
    }
    columns += [titles[name] for name in measured] + (["trusted"] if judged else [])
    table = []
    for row in rows:
        cells = [_place(row), row["label"], f"{row['probability']:.4f}"]
        if top > 1:
            rest = (f"{one['label']} {one['probability']:.4f}" for one in row["top"][1:])
            cells.append(", ".join(rest))
        cells += [f"{row[name]:.4g}" for name in measured]
        table.append(cells + ([("yes" if row["trusted"] else "NO")] if judged else []))
    # Names of files and labels may look like rich's markup.
    table = [[escape(cell) for cell in cells] for cells in table]
    print_table(columns, table, text_columns=2, wrapped=(0, 1))


def _read_labels(path):
    from pathlib import Path

    expected = "Expected a name on each line, a JSON list, or JSON with a list labels."
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--labels: cannot be read: {reason}. Received: {path!r}.") from None
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.strip().splitlines()]
    try:
        found = json.loads(text)
        found = found["labels"] if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--labels: not labels. Received: {path!r}. {expected}") from None
    return [str(name) for name in found]
