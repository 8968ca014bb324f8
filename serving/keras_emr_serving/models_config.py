"""``models.config``: TensorFlow Serving's list of models, read and changed with care.

A change rewrites only the version policy and the labels of one model. Everything else (other
models, comments, fields that this version does not know) stays as it was written, byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from keras_emr.errors import UserError
from keras_emr_serving.server.config import CONFIG as NAME
from keras_emr_serving.server.config import ModelConfig, from_proto
from keras_emr_serving.server.status import ServingError
from keras_emr_serving.text_layout import comments_in, fields, named


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
            # Not as text: that would turn every kind of line end into one.
            return self.path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{NAME}: cannot be read: {_reason(error)}. Received: {str(self.path)!r}."
            ) from None

    def age(self) -> float:
        """Seconds since the file was written; 0 without one."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except OSError:
            return 0.0

    def models(self, text: str) -> dict[str, ModelConfig]:
        """Model name -> its configuration. Raises :class:`UserError` naming the file."""
        config = self._parse(text)
        if not config.ListFields() and not fields(text, 0, len(text)):
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
        # Lines that end as Windows ends them still do afterwards.
        windows = text.count("\n") == text.count("\r\n") > 0
        before = text.replace("\r\n", "\n") if windows else text
        made = self._added(before, entry) if new else self._replaced(before, entry)
        made = made.replace("\n", "\r\n") if made and windows else made
        if made is None or self._parse(made) != config:
            raise UserError(
                f"{NAME}: too unusual to change without losing something in it. Received: "
                f"{str(self.path)!r}. Write each model as `config {{ ... }}` in one "
                "`model_config_list { ... }`."
            )
        return made

    def _added(self, text, entry):
        block = f"  config {{\n{_printed(entry, 4)}  }}\n"
        lists = named(text, 0, len(text), "model_config_list")
        if not lists:
            before = text if not text or text.endswith("\n") else text + "\n"
            return f"{before}model_config_list {{\n{block}}}\n"
        end = lists[-1][2] - 1  # before the closing brace
        head = text[:end].rstrip(" \t")
        return head + ("" if head.endswith("\n") else "\n") + block + text[end:]

    def _replaced(self, text, entry):
        found = [
            one
            for block in named(text, 0, len(text), "model_config_list")
            for one in named(text, block[1] + 1, block[2] - 1, "config")
            if text[one[1]] in "{<" and self._name(text[one[1] + 1 : one[2] - 1]) == entry.name
        ]
        if len(found) != 1:
            return None
        start, end = found[0][1] + 1, found[0][2] - 1
        old = [
            one
            for field in ("model_version_policy", "version_labels")
            for one in named(text, start, end, field)
        ]
        kept, position, comments = "", start, []
        for first, _, last in sorted(old):
            if not self._is_known(text[first:last]):
                return None
            comments += comments_in(text[first:last])
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
        noted = "".join(f"    {comment}\n" for comment in comments)
        return f"{text[:start]}{kept}\n{noted}{_printed(own, 4)}  {text[end:]}"

    def _is_known(self, field):
        """Whether nothing in it is of a newer server: that would be lost with it."""
        from google.protobuf import text_format
        from tensorflow_serving.config.model_server_config_pb2 import ModelConfig as Proto

        try:
            text_format.Parse(field, Proto())
        except text_format.ParseError:
            return False
        return True

    def _name(self, block):
        from google.protobuf import text_format
        from tensorflow_serving.config.model_server_config_pb2 import ModelConfig as Proto

        return text_format.Parse(block, Proto(), allow_unknown_field=True).name

    def write(self, text: str, over: str | None = None) -> None:
        """Put ``text`` in place of the file in one step.

        Args:
            text: what shall stand there.
            over: what stands there now; ``None``: whatever does.

        Raises:
            UserError: it cannot be written, or somebody else, without our lock, has changed it.
        """
        if over is not None and self.read() != over:
            raise UserError(
                f"{NAME}: somebody else has changed it meanwhile. Received: {str(self.path)!r}. "
                "Nothing of that is undone: look at it, and call this again."
            )
        # Where it is a link, the file that it leads to.
        path, temporary = Path(os.path.realpath(self.path)), None
        try:
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            descriptor, temporary = tempfile.mkstemp(prefix=f".{NAME}.", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)  # the server runs as another user
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            temporary = None
            _sync_folder(path.parent)
        except OSError as error:
            raise UserError(
                f"{NAME}: cannot be written: {_reason(error)}. Received: {str(path)!r}. Expected a "
                "folder that this user may write to."
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
