"""Ask again, later each time, where the error allows it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from keras_emr.errors import UserError
from keras_emr_serving.client.errors import ClientError


@dataclass
class Retry:
    """When and how often to ask again.

    What is asked for (status, metadata, predictions) changes nothing on the server, so that asking
    twice does no harm. It is asked again after a connection that was refused, or broke before the
    whole answer was there, and after 429, 503, RESOURCE_EXHAUSTED and UNAVAILABLE. Not after any
    other answer, which would be the same again; and not when the time for an answer ran out: a
    server that is too slow for a request gets slower by being asked twice.

    Args:
        times: how often to ask again; 0: never.
        first: pause before the first retry in seconds; it doubles each time.
        longest: the longest pause. Of a pause, a random half is left out, so that many clients do
            not come back together. A server's ``Retry-After`` is kept, up to ``longest``.
    """

    times: int = 4
    first: float = 0.2
    longest: float = 5.0
    sleep: object = field(default=time.sleep, repr=False)
    uniform: object = field(default=random.uniform, repr=False)

    def __post_init__(self):
        if self.times < 0:
            raise UserError(f"retries: bad value. Received: {self.times}. Expected >= 0.")

    def call(self, function):
        """What ``function()`` returns. Raises its last :class:`ClientError`."""
        for number in range(self.times + 1):
            try:
                return function()
            except ClientError as error:
                if not error.retryable or number == self.times:
                    raise
                self.sleep(self.pause(number, error.retry_after))

    def pause(self, number, retry_after=None):
        """Seconds to wait before retry ``number``, counted from 0."""
        wait = min(self.longest, self.first * 2**number)
        wait = self.uniform(wait / 2, wait)
        return wait if retry_after is None else max(wait, min(self.longest, retry_after))
