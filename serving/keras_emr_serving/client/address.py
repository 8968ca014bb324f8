"""Where a model is served: the parts of a URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from keras_emr.errors import UserError

_EXPECTED = (
    "Expected http://HOST:8501/v1/models/NAME or grpc://HOST:8500/v1/models/NAME, and after it "
    "/versions/N or /labels/L where one is meant (https and grpcs: with TLS)."
)
_PATH = re.compile(
    r"(?P<before>.*?)/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
)
_PROTOCOLS = {
    "http": ("rest", False),
    "https": ("rest", True),
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
}


@dataclass(frozen=True)
class Address:
    """``protocol``: ``rest`` or ``grpc``. ``before``: what a proxy has in front of ``/v1``."""

    protocol: str
    tls: bool
    host: str
    port: int
    before: str
    name: str
    version: int | None = None
    label: str | None = None

    @property
    def target(self) -> str:
        """``HOST:PORT``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def model_url(self) -> str:
        """The URL of the model, with the version or label that is asked for."""
        text = self.whole_model_url
        if self.version is not None:
            return f"{text}/versions/{self.version}"
        return text if self.label is None else f"{text}/labels/{quote(self.label, safe='')}"

    @property
    def whole_model_url(self) -> str:
        """The URL of the model without version or label."""
        scheme = {"rest": "http", "grpc": "grpc"}[self.protocol] + ("s" if self.tls else "")
        return f"{scheme}://{self.target}{self.before}/v1/models/{quote(self.name, safe='')}"


def parse(url, protocol=None, version=None, label=None) -> Address:
    """The parts of ``url``; the other arguments win over what it says.

    Args:
        url: as in the error message below.
        protocol: ``rest``, ``grpc`` or ``None``: the URL's.
        version: whole number, or ``None``.
        label: text, or ``None``.

    Raises:
        UserError: not such a URL; a version and a label.
    """
    if protocol not in (None, "rest", "grpc"):
        raise UserError(f"protocol: unknown. Received: {protocol!r}. Expected rest or grpc.")
    text = str(url).strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _bad(url) from None
    # A password in a URL ends up in every error message and log.
    if parts.username or parts.query or parts.fragment or not host:
        raise _bad(url)
    if parts.scheme not in _PROTOCOLS or any(c.isspace() for c in text):
        raise _bad(url)
    found = _PATH.fullmatch(parts.path.rstrip("/"))
    if found is None:
        raise _bad(url)
    own, tls = _PROTOCOLS[parts.scheme]
    protocol = protocol or own
    version, label = _which(found, version, label)
    usual = (443 if tls else 80) if own == "rest" and protocol == "rest" else 8500
    name = unquote(found["name"])
    port = usual if port is None else port
    return Address(protocol, tls, host, port, found["before"], name, version, label)


def _which(found, version, label):
    if version is None and label is None:
        version, label = found["version"], found["label"]
        label = None if label is None else unquote(label)
    if version is not None and label is not None:
        raise UserError(
            f"a version and a label. Received: version {version}, label {label!r}. Expected one."
        )
    if version is not None:
        whole = str(version).isascii() and str(version).isdigit()
        if not whole or int(version) >= 2**63:
            raise UserError(f"version: bad value. Received: {version}. Expected a number >= 0.")
        version = int(version)
    return version, label


def _bad(url):
    return UserError(f"url: not the address of a model. Received: {str(url)!r}. {_EXPECTED}")
