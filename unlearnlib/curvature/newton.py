"""The Newton update θ + αH⁻¹Δ for a language model: curvature as products, and nothing else of it in memory.

H is the Hessian of the mean loss over some sequences, or its Gauss–Newton part, which is positive semi-definite.
Neither is ever formed: a product costs a few gradients, and Krylov methods make the rest out of products.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.cost import measure
from unlearnlib.curvature.krylov import (
    REMEDY,
    Lanczos,
    NegativeCurvature,
    NotConverged,
    Smallest,
    Solution,
    conjugate_gradients,
    lanczos,
    smallest_eigenvalue,
)
from unlearnlib.curvature.protocol import check_damping
from unlearnlib.losses import logits, note_pass, sequence_losses, shared_batches
from unlearnlib.weights import Vector, flatten, mean_gradient, parameters, unflatten

Measure = Callable[[PreTrainedModel, Tensor], Tensor]


def token_cross_entropy(z: Tensor, sequences: Tensor) -> Tensor:
    """The loss of each sequence in nats [n] as a function of its logits z [n, tokens - 1, vocabulary]."""
    targets = sequences[:, 1:].to(z.device)
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(dim=1)


class MatrixFree:
    """A curvature of the mean over ``sequences`` [m, tokens], at the weights ``model`` has now.

    It keeps a copy of the model, works through the sequences in batches, so that memory does not grow with m,
    and implements the protocol ``Curvature``. ``tolerance`` is the relative residual at which
    :meth:`solve` stops, ``max_iterations`` the most products it and :meth:`power` may use.

    Raises ValueError if there are no sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        tolerance: float = 1e-3,
        max_iterations: int = 200,
    ) -> None:
        if len(sequences) == 0:
            raise ValueError("curvature needs at least one sequence, and there are none")
        self.model = copy.deepcopy(model)
        self.sequences = sequences
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def batch_product(self, batch: Tensor, v: Vector) -> tuple[Tensor, ...]:
        """The product of v with the curvature of the sum of the losses of one batch, parameter by parameter."""
        raise NotImplementedError

    def matvec(self, v: Vector) -> Vector:
        """The product C v; several processes take a share of the sequences each.

        Raises FloatingPointError if it is not finite.
        """
        total = {name: torch.zeros_like(p) for name, p in parameters(self.model).items()}
        # The math kernel is the one that can be differentiated twice, and forwards.
        with distributed.together(), sdpa_kernel(SDPBackend.MATH):
            for batch, _ in shared_batches(self.model, self.sequences):
                for value, part in zip(total.values(), self.batch_product(batch, v), strict=True):
                    value += part / len(self.sequences)
        distributed.sum_over(total.values())
        finite = torch.stack([torch.isfinite(value).all() for value in total.values()])
        if not finite.all():  # looked at once: an accelerator would have to wait every time
            name = list(total)[int((~finite).nonzero()[0])]
            raise FloatingPointError(
                f"the curvature product is not finite at {name}: check the weights, or use a wider format"
            )
        return total

    def _row_product(self, like: Vector, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
        return lambda row: flatten(self.matvec(unflatten(row, like))) + damping * row

    def solve(self, v: Vector, damping: float) -> Vector:
        """The solution x of (C + λI) x = v by conjugate gradients; raises what these raise."""
        return unflatten(self.solution(v, damping).x, v)

    def solution(self, v: Vector, damping: float, precondition: Callable | None = None) -> Solution:
        """As :meth:`solve`, with the residuals on the way; ``precondition`` acts on rows [d]."""
        check_damping(damping)
        return conjugate_gradients(
            self._row_product(v, damping), flatten(v), self.tolerance, self.max_iterations, precondition
        )

    def lanczos(self, v: Vector, steps: int, description: str | None = None) -> Lanczos:
        """``steps`` steps of Lanczos's method from v, a product each: the solutions for every λ in one run."""
        return lanczos(self._row_product(v), flatten(v), steps, description)

    def smallest_eigenvalue(self, v: Vector, description: str | None = None, **settings: float) -> Smallest:
        """The smallest eigenvalue of C by :func:`unlearnlib.curvature.krylov.smallest_eigenvalue` from v."""
        return smallest_eigenvalue(self._row_product(v), flatten(v), description=description, **settings)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(C + λI)^p v by Lanczos's method, in ``max_iterations`` steps or until the space closes.

        Raises NotConverged if the last tenth of the steps still changed the result by more than the tolerance,
        NegativeCurvature if C + λI turns out not to be positive definite.
        """
        check_damping(damping)

        def raised(values: Tensor) -> Tensor:
            lowest = values.min().item()
            if lowest + damping <= 0:
                raise NegativeCurvature(
                    f"the curvature has an eigenvalue of {lowest:.2e} or less, perhaps much less. {REMEDY}"
                )
            return (values + damping) ** exponent

        krylov = self.lanczos(v, self.max_iterations)
        steps = len(krylov.matrix)
        result = krylov.apply(raised)
        change = (result - krylov.apply(raised, max(1, round(0.9 * steps)))).norm() / result.norm()
        if change > self.tolerance and steps == self.max_iterations:
            raise NotConverged(
                f"the last tenth of {steps} steps changed the power by {change:.1e}, more than "
                f"{self.tolerance:.1e}: allow more iterations or raise the damping"
            )
        return unflatten(result, v)


class Hessian(MatrixFree):
    """The Hessian of the mean of ``loss(model, batch)``, one value a sequence. It may be indefinite."""

    def __init__(
        self, model: PreTrainedModel, sequences: Tensor, loss: Measure = sequence_losses, **settings: float
    ) -> None:
        super().__init__(model, sequences, **settings)
        self.loss = loss

    def batch_product(self, batch: Tensor, v: Vector) -> tuple[Tensor, ...]:
        """Pearlmutter's (1994) product: the gradient of gᵀv, where g is the gradient."""
        live = list(parameters(self.model).values())
        gradient = torch.autograd.grad(self.loss(self.model, batch).sum(), live, create_graph=True)
        slope = torch.stack([(g * v[name]).sum() for g, name in zip(gradient, v, strict=True)]).sum()
        return torch.autograd.grad(slope, live)


class GaussNewton(MatrixFree):
    """The Gauss–Newton matrix JᵀBJ of a loss of outputs: J the Jacobian of the outputs, B the Hessian above them.

    ``outputs(model, batch)`` are the network's outputs, ``output_loss(outputs, batch)`` one loss a sequence. Where
    that loss is convex in the outputs, as cross-entropy is in the logits, the matrix is positive semi-definite,
    and for cross-entropy it is the Fisher information (chapter 6).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        outputs: Measure = logits,
        output_loss: Callable[[Tensor, Tensor], Tensor] = token_cross_entropy,
        **settings: float,
    ) -> None:
        super().__init__(model, sequences, **settings)
        self.outputs = outputs
        self.output_loss = output_loss

    def batch_product(self, batch: Tensor, v: Vector) -> tuple[Tensor, ...]:
        """J v forwards, B by two derivatives of the loss above, Jᵀ backwards (Schraudolph 2002)."""
        live = parameters(self.model)
        z = self.outputs(self.model, batch)
        change = self.output_change(batch, v)
        top = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.output_loss(top, batch).sum(), top, create_graph=True)
        (bent,) = torch.autograd.grad(slope, top, grad_outputs=change)
        return torch.autograd.grad(z, list(live.values()), grad_outputs=bent)

    def output_change(self, batch: Tensor, v: Vector) -> Tensor:
        """J v: how the outputs change as the weights in v move along it, by forward-mode differentiation.

        Weights that v does not name stand still.
        """
        wrapped, live = Outputs(self.model, self.outputs), parameters(self.model)
        with torch.no_grad(), forward_ad.dual_level():
            note_pass(2 * len(batch))  # a change of x W is two products, beside x W itself
            moving = {f"model.{name}": forward_ad.make_dual(live[name], x) for name, x in v.items()}
            return forward_ad.unpack_dual(functional_call(wrapped, moving, (batch,))).tangent


class Outputs(nn.Module):
    """A model together with what is wanted of it, in the one form that ``functional_call`` takes."""

    def __init__(self, model: PreTrainedModel, outputs: Measure) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, batch: Tensor) -> Tensor:
        """What is wanted of the model on a batch."""
        return self.outputs(self.model, batch)


def cost_in_gradients(
    function: Callable[[], object], model: PreTrainedModel, sequences: Tensor
) -> tuple[float, float]:
    """Time and peak memory of ``function()`` in units of those of one gradient of the loss over ``sequences``.

    Both are measured here and now, by :func:`unlearnlib.cost.measure`.
    """
    gradient = measure(lambda: mean_gradient(model, sequences, sequence_losses), model.device)
    cost = measure(function, model.device)
    return cost.seconds / gradient.seconds, cost.peak_bytes / gradient.peak_bytes
