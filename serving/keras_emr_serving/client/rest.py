"""TensorFlow Serving's REST API, asked with requests."""

from __future__ import annotations

import json
import re
from functools import cached_property

from keras_emr.errors import UserError
from keras_emr_serving.client.errors import ClientError, timed_out
from keras_emr_serving.client.payload import read_outputs, request_body
from keras_emr_serving.client.signature import Metadata, Signature, Tensor, VersionStatus, sides


class RestTransport:
    """One model over HTTP. Every method asks once and raises :class:`ClientError`.

    Args:
        address: :class:`Address`.
        timeout: seconds to connect, and to wait for more of an answer.
        ca, certificate, key: PEM files for https, or ``None``.
        headers: name -> value, sent with every request, e.g. of an authorising proxy.
    """

    # Numbers travel as text, about so many bytes each.
    number_bytes = 12

    def __init__(self, address, timeout, ca=None, certificate=None, key=None, headers=None):
        try:
            import requests  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"REST: a package is missing. Received: {error}. Expected requests: pip install "
                '"keras-emr[serving]".'
            ) from None
        self.address, self.timeout = address, timeout
        self._ca, self._certificate, self._key = ca, certificate, key
        self._headers = dict(headers or {})

    @cached_property
    def _session(self):
        import requests

        session = requests.Session()
        session.headers.update(self._headers)
        return session

    def _tls(self):
        # With each request: what stands in REQUESTS_CA_BUNDLE wins over a session's own.
        certificate = self._certificate and str(self._certificate)
        return {
            "verify": None if self._ca is None else str(self._ca),
            "cert": (certificate, str(self._key)) if self._key else certificate,
        }

    def close(self):
        if "_session" in self.__dict__:
            self._session.close()

    def status(self):
        """List of :class:`VersionStatus`."""
        url = self.address.model_url
        return self._read(url, self._ask("GET", url), _statuses)

    def metadata(self):
        """:class:`Metadata`."""
        url = f"{self.address.model_url}/metadata"
        return self._read(url, self._ask("GET", url), _metadata)

    def predict(self, name, signature, inputs):
        """Outputs by name. ``signature``: :class:`Signature` of ``name``."""
        url = f"{self.address.model_url}:predict"
        answer = self._ask("POST", url, request_body(name, inputs))
        return self._read(url, answer, lambda text: read_outputs(text, signature))

    def label_names(self, feature, numbers):
        """Names of the classes, in the order of the signature ``classify``.

        Args:
            feature: name of the image in a tf.Example.
            numbers: how many it has.
        """
        url = f"{self.address.model_url}:classify"
        # All float: the whole numbers of JSON would be int64 features.
        request = {"signature_name": "classify", "examples": [{feature: [0.0] * numbers}]}
        answer = self._ask("POST", url, json.dumps(request).encode())
        return self._read(url, answer, lambda t: [str(r[0]) for r in json.loads(t)["results"][0]])

    def _ask(self, method, url, body=None):
        import requests

        headers = {"Content-Type": "application/json"} if body else {}
        try:
            answer = self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=self.timeout,
                allow_redirects=False,  # a POST would come out as a GET
                **self._tls(),
            )
        except requests.exceptions.ConnectTimeout:
            message = f"cannot connect within {self.timeout:g} s."
            raise ClientError(None, message, url, retryable=True) from None
        except requests.exceptions.Timeout:
            raise timed_out(self.timeout, url) from None
        except requests.exceptions.SSLError as error:
            raise ClientError(None, f"TLS: {_reason(error)}.", url) from None
        except requests.exceptions.ProxyError as error:
            message = f"the proxy that the environment names: {_reason(error)}."
            raise ClientError(None, message, url, retryable=True) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as e:
            if "timed out" in str(e):  # while the answer was coming
                raise timed_out(self.timeout, url) from None
            reason = _reason(e)
            if not reason.isascii() or not reason.isprintable():  # the frames of HTTP/2
                reason = "not HTTP. Is it the port of gRPC (grpc://)?"
            raise ClientError(None, reason, url, retryable=True) from None
        except requests.exceptions.RequestException as error:
            raise ClientError(None, f"{_reason(error)}.", url) from None
        except OSError as error:  # files of TLS
            raise UserError(f"TLS: {error}. Expected PEM files.") from None
        if answer.status_code != 200:
            raise ClientError(
                answer.status_code, _text(answer), url, retry_after=_retry_after(answer)
            )
        return answer.content

    def _read(self, url, text, reader):
        try:
            return reader(text)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            shown = text[:60].decode(errors="replace")
            message = f"not what TensorFlow Serving answers. Received: {shown!r}."
            raise ClientError(200, message, url) from None


def _text(answer):
    """The server's words, or what else came, in short."""
    try:
        return str(answer.json()["error"]).split("\n")[0][:600]
    except (ValueError, KeyError, TypeError):
        plain = re.sub(r"<[^>]*>", " ", answer.text[:2000])
        return " ".join(plain.split())[:200] or answer.reason or "nothing."


def _retry_after(answer):
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _reason(error):
    """What the innermost error says: requests wraps it several times."""
    inner = error
    while True:
        deeper = getattr(inner, "reason", None)
        if not isinstance(deeper, BaseException):
            deeper = next((a for a in inner.args if isinstance(a, BaseException)), None)
        if deeper is None:
            break
        inner = deeper
    text = getattr(inner, "strerror", None) or (str(inner.args[0]) if inner.args else "")
    # urllib3 puts words of its own and the number of the error in front.
    text = re.sub(r"^.*\[Errno -?\d+\] ", "", text)
    return text.rstrip(".)") or type(inner).__name__


def _statuses(text):
    return [
        VersionStatus(int(row["version"]), row["state"], row["status"]["error_message"])
        for row in json.loads(text)["model_version_status"]
    ]


def _metadata(text):
    content = json.loads(text)
    spec, signatures = content["model_spec"], content["metadata"]["signature_def"]["signature_def"]
    found = {
        name: Signature(one["method_name"], _tensors(one["inputs"]), _tensors(one["outputs"]))
        for name, one in signatures.items()
        if not name.startswith("__")
    }
    return Metadata(spec["name"], int(spec["version"]), found)


def _tensors(described):
    return {name: Tensor(one["dtype"], _shape(one)) for name, one in described.items()}


def _shape(one):
    shape = one["tensor_shape"]
    return sides([dim["size"] for dim in shape.get("dim", ())], shape.get("unknown_rank"))
