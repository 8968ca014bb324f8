"""``models.config``: TensorFlow Serving's list of models, read and changed with care.

A change rewrites only the version policy and the labels of one model. Everything else (other
models, comments, fields that this version does not know) stays as it was written, byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from keras_emr.errors import UserError
from keras_emr_serving.server.config import ModelConfig, from_proto
from keras_emr_serving.server.status import ServingError

NAME = "models.config"
_TOKEN = re.compile(
    r"""\s+ | \#[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | [\w.+/-]+ | .""",
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"{": "}", "<": ">", "[": "]"}


class ConfigFile:
    """``models.config`` in a model store.

    Args:
        store: the folder with ``NAME/VERSION`` in it.
    """

    def __init__(self, store: Path):
        self.path = Path(store) / NAME

    def read(self) -> str:
        """The text; empty if there is no file yet. Raises :class:`UserError`."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{NAME}: cannot be read: {_reason(error)}. Received: {str(self.path)!r}."
            ) from None

    def models(self, text: str) -> dict[str, ModelConfig]:
        """Model name -> its configuration. Raises :class:`UserError` naming the file."""
        config = self._parse(text)
        if not config.ListFields() and not _fields(text, 0, len(text)):
            return {}
        try:
            return {one.name: one for one in from_proto(config)}
        except ServingError as error:
            raise UserError(f"{NAME}: {error.message}. Received: {str(self.path)!r}.") from None

    def _parse(self, text):
        from google.protobuf import text_format
        from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

        try:
            # A newer server's fields are its own business.
            return text_format.Parse(text, ModelServerConfig(), allow_unknown_field=True)
        except text_format.ParseError as error:
            raise UserError(
                f"{NAME}: not a ModelServerConfig: {error}. Received: {str(self.path)!r}."
            ) from None

    def changed(
        self,
        text: str,
        name: str,
        versions: list[int],
        labels: Mapping[str, int],
        base_path: str,
    ) -> str:
        """``text`` with policy ``specific`` and these labels for model ``name``.

        A model that is not listed yet is added, with ``base_path``; one that is keeps its own.

        Raises:
            UserError: the file cannot be changed without losing something in it.
        """
        config = self._parse(text)
        entry = next((one for one in config.model_config_list.config if one.name == name), None)
        new = entry is None
        if new:
            entry = config.model_config_list.config.add(
                name=name, base_path=base_path, model_platform="tensorflow"
            )
        entry.ClearField("model_version_policy")
        entry.ClearField("version_labels")
        entry.model_version_policy.specific.versions.extend(versions)
        entry.version_labels.update(labels)
        made = self._added(text, entry) if new else self._replaced(text, entry)
        if made is None or self._parse(made) != config:
            raise UserError(
                f"{NAME}: too unusual to change without losing something in it. Received: "
                f"{str(self.path)!r}. Write each model as `config {{ ... }}` in one "
                "`model_config_list { ... }`."
            )
        return made

    def _added(self, text, entry):
        block = f"  config {{\n{_printed(entry, 4)}  }}\n"
        lists = _named(text, 0, len(text), "model_config_list")
        if not lists:
            before = text if not text or text.endswith("\n") else text + "\n"
            return f"{before}model_config_list {{\n{block}}}\n"
        end = lists[-1][2] - 1  # before the closing brace
        head = text[:end].rstrip(" \t")
        return head + ("" if head.endswith("\n") else "\n") + block + text[end:]

    def _replaced(self, text, entry):
        found = [
            one
            for block in _named(text, 0, len(text), "model_config_list")
            for one in _named(text, block[1] + 1, block[2] - 1, "config")
            if text[one[1]] in "{<" and self._name(text[one[1] + 1 : one[2] - 1]) == entry.name
        ]
        if len(found) != 1:
            return None
        start, end = found[0][1] + 1, found[0][2] - 1
        old = [
            one
            for field in ("model_version_policy", "version_labels")
            for one in _named(text, start, end, field)
        ]
        kept, position = "", start
        for first, _, last in sorted(old):
            # A line that held nothing else goes with its field.
            head = text[position:first]
            kept += head.rstrip(" \t")
            position = last
            if (not kept or kept.endswith("\n")) and text[last : last + 1] == "\n":
                position += 1
        kept = (kept + text[position:end]).rstrip()
        own = type(entry)(
            model_version_policy=entry.model_version_policy, version_labels=entry.version_labels
        )
        return f"{text[:start]}{kept}\n{_printed(own, 4)}  {text[end:]}"

    def _name(self, block):
        from google.protobuf import text_format
        from tensorflow_serving.config.model_server_config_pb2 import ModelConfig as Proto

        return text_format.Parse(block, Proto(), allow_unknown_field=True).name

    def write(self, text: str) -> None:
        """Put ``text`` in place of the file in one step. Raises :class:`UserError`."""
        folder, temporary = self.path.parent, None
        try:
            mode = self.path.stat().st_mode & 0o777 if self.path.exists() else 0o644
            descriptor, temporary = tempfile.mkstemp(prefix=f".{NAME}.", dir=folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), mode)  # the server runs as another user
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            temporary = None
            _sync_folder(folder)
        except OSError as error:
            raise UserError(
                f"{NAME}: cannot be written: {_reason(error)}. Received: {str(self.path)!r}."
            ) from None
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def restore(self, text: str) -> None:
        """Undo :meth:`write`: put back ``text``, or no file where :meth:`read` found none."""
        if text:
            self.write(text)
        else:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, seconds: float = 30.0) -> Iterator[None]:
        """Only one writer at a time. The lock goes with its process, however that ends.

        Raises:
            UserError: another writer does not finish in ``seconds``, or no lock can be had there.
        """
        import fcntl

        path = self.path.with_name(f".{NAME}.lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{NAME}: its folder cannot be written to: {_reason(error)}. Received: "
                f"{str(path.parent)!r}."
            ) from None
        try:
            deadline = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise UserError(
                            f"{NAME}: another keras-emr serving command is changing it. Received: "
                            f"{str(self.path)!r}. Wait until that one has ended."
                        ) from None
                    time.sleep(0.05)
                except OSError as error:
                    raise UserError(
                        f"{NAME}: cannot be locked: {_reason(error)}. Received: {str(path)!r}."
                    ) from None
            yield
        finally:
            os.close(descriptor)


def _reason(error):
    return getattr(error, "strerror", None) or "not a text file"


def _sync_folder(folder):
    """So that the new name, too, survives a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _printed(message, indent):
    from google.protobuf import text_format

    return text_format.MessageToString(message, indent=indent)


def _named(text, start, end, name):
    """(begin, begin of the value, end) of the fields called ``name``."""
    return [field[1:] for field in _fields(text, start, end) if field[0] == name]


def _fields(text, start, end):
    """(name, begin, begin of the value, end) of the fields in a piece of a text proto.

    The text has been parsed before: only its layout is of interest here.
    """
    tokens = [
        (found.group(), found.start(), found.end())
        for found in _TOKEN.finditer(text, start, end)
        if not found.group().isspace() and not found.group().startswith("#")
    ]
    fields, i = [], 0
    while i < len(tokens):
        word, first, last = tokens[i]
        if word in ";,":
            i += 1
            continue
        i = _after(tokens, i)  # a name, or [an.extension]
        if i < len(tokens) and tokens[i][0] == ":":
            i += 1
        if i >= len(tokens):
            fields.append((word, first, last, last))
            break
        value = tokens[i][1]
        quoted = tokens[i][0][0] in "\"'"
        i = _after(tokens, i)
        while quoted and i < len(tokens) and tokens[i][0][0] in "\"'":
            i += 1  # strings side by side are one
        last = tokens[i - 1][2]
        if i < len(tokens) and tokens[i][0] in ";,":
            last = tokens[i][2] if tokens[i - 1][0] not in "}>]" else last
            i += 1
        fields.append((word, first, value, last))
    return fields


def _after(tokens, i):
    """The token after the one at ``i``, or after the bracket that it opens."""
    opened = tokens[i][0]
    if opened not in _CLOSING:
        return i + 1
    depth, closing = 0, _CLOSING[opened]
    while i < len(tokens):
        depth += (tokens[i][0] == opened) - (tokens[i][0] == closing)
        i += 1
        if depth == 0:
            break
    return i
