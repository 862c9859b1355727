"""Define `Loss`, the result of an objective: a weighted sum of named terms."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss or a part of a loss, with its named terms. ``+`` adds two parts.

    The keys of `values`, `weights` and `log` are names such as "loss/rec". Only `log` is written to
    the log.

    Attributes:
        total: sum of weight times value over the terms, a scalar with its graph.
        values: unweighted value of each term, scalars with their graph.
        weights: weight of each term in this update.
        log: values for the log, scalars without graph. If there is a KL, the log has the plain KL,
            even if the loss has another form of the KL, such as free bits.
    """

    total: Tensor
    values: dict[str, Tensor]
    weights: dict[str, Tensor | float]
    log: dict[str, Tensor]

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            total=self.total + other.total,
            values=self.values | other.values,
            weights=self.weights | other.weights,
            log=self.log | other.log,
        )
