"""How long an answer will be: what shortest-job-first orders by when the client did not say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from pagedattn.engine.request import Request

# A mean forgets with this rate, so that it follows a workload that changes; its first values are a plain mean.
_LEARNING_RATE = 0.02
# A mean over few requests is trusted as if the wider one had been seen this often as well.
_PRIOR_WEIGHT = 4.0
_MAX_GROUPS = 4096  # client ids are the clients' choice


class LengthPredictor(Protocol):
    """``predict`` may be asked at any time and has to be cheap; ``observe`` gets each request that ended by itself."""

    def predict(self, request: Request) -> float:
        """The output tokens that the request will have had in the end."""
        ...

    def observe(self, request: Request) -> None: ...


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: int = 0

    def update(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(_LEARNING_RATE, 1.0 / self.count)


class MeanLengthPredictor:
    """Learns the mean output length of all requests, of each client's, and of each client's by the prompt's length.

    A narrow mean is shrunk towards the wider one in proportion to how little it has seen. Before the first request has
    ended a prediction is the request's own bound. Predictions are never above that bound.
    """

    def __init__(self) -> None:
        self._everyone = _Mean()
        self._groups: OrderedDict[Hashable, _Mean] = OrderedDict()  # the latest used is last

    def predict(self, request: Request) -> float:
        bound = request.max_num_tokens - request.num_prompt_tokens
        if not self._everyone.count:
            return float(bound)
        estimate = self._everyone.value
        for key in self._keys(request):
            mean = self._groups.get(key)
            if mean is not None:
                estimate = (mean.value * mean.count + estimate * _PRIOR_WEIGHT) / (mean.count + _PRIOR_WEIGHT)
        return min(max(estimate, 1.0), float(bound))

    def observe(self, request: Request) -> None:
        length = float(len(request.token_ids) - request.num_prompt_tokens)  # one may be pending, and not be its
        self._everyone.update(length)
        for key in self._keys(request):
            mean = self._groups.setdefault(key, _Mean())
            self._groups.move_to_end(key)
            mean.update(length)
        while len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)

    @staticmethod
    def _keys(request: Request) -> tuple[Hashable, Hashable]:
        """From wide to narrow."""
        client_id = request.scheduling.client_id
        return client_id, (client_id, request.num_prompt_tokens.bit_length())


def expected_output_tokens(request: Request, predictor: LengthPredictor) -> float:
    """The client's estimate if it gave one, else the predictor's; at most what the request may have.

    The predictor is asked once, so that a request's place in line does not depend on when it is looked at.
    """
    if request.expected_output_tokens is None:
        given = request.scheduling.expected_output_tokens
        expected = predictor.predict(request) if given is None else given
        bound = float(request.max_num_tokens - request.num_prompt_tokens)
        # NaN would be neither before nor after any other, and a heap with it in no order.
        request.expected_output_tokens = min(expected, bound) if expected >= 0 else bound
    return request.expected_output_tokens
