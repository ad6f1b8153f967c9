"""DARTS's bilevel optimisation and the derivation of an arch, equation numbers being those of arXiv:1806.09055v2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corenas.calibrate import statistics_kept
from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.errors import UserError
from corenas.mutable import Mixing, apply, mutables
from corenas.regularisation import unregularised
from corenas.space import Arch, SearchSpace
from corenas.variables import Variable
from corenas_algorithm_darts import DARTS

Loss = Callable[[], Tensor]
"""A loss as the weights and the architecture weights are when it is called."""

NONE = "none"
"""The candidate that gives zeros; it is weighted, and never derived."""


class DARTSTrainer:
    """Trains the weights w of a network and its architecture weights alpha in turn (algorithm 1).

    names: key of each variable that is relaxed -> the candidates, in the order of their weights
    alphas: key -> a tensor of these weights, before the softmax. All layers of a variable share them.
    """

    def __init__(self, options: DARTS, context: AlgorithmContext) -> None:
        self.supernet, self.task, self.space, self.order = context.supernet, context.task, context.space, options.order
        self.device = context.device
        self.phases = [Phase(context.space, context.train)]
        self.names = mixed_variables(context.supernet, context.space)
        self.alphas = {key: nn.Parameter(1e-3 * torch.randn(len(names))) for key, names in self.names.items()}
        for alpha in self.alphas.values():
            alpha.data = alpha.data.to(context.device)
        self.optimizer = torch.optim.Adam(
            [*self.alphas.values()], options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
        self._valid_loss: Tensor | None = None

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Step alpha on a validation batch, then lend w its gradient on the training batch.

        Where a batch is cut into parts, alpha takes its one step before the first, by what the first says of w.
        """
        if step.part == 0:
            self._valid_loss = self._step_alphas(batch, step)
        alphas = {key: alpha.detach() for key, alpha in self.alphas.items()}
        loss = step.backward(self._loss(batch, alphas))
        assert self._valid_loss is not None
        return {"loss": loss, "valid_loss": self._valid_loss}

    def _step_alphas(self, batch: Any, step: Step) -> Tensor:
        """Descend the gradient of the validation loss. Returns this loss.

        The validation data is augmented, since it is cut from the training data and trained on.
        """
        valid = step.more("valid", augmented=True)
        alphas = [*self.alphas.values()]
        # Statistics of batch norm are those of training batches. Other units dropped at w+ than at w- would be all
        # that their difference shows, and so would rounding in half precision.
        exact = torch.autocast(self.device.type, enabled=False)
        with statistics_kept(self.supernet), unregularised(self.supernet), exact:
            if self.order == 1:
                loss, gradients = first_order_gradient(lambda: self._loss(valid, self.alphas), alphas, step)
            else:
                loss, gradients = second_order_gradient(
                    lambda: self._loss(batch, self.alphas), lambda: self._loss(valid, self.alphas), alphas, step
                )
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.grad = gradient
        self.optimizer.step()
        return loss

    def _loss(self, batch: Any, alphas: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the mixed network (eq. 2)."""
        mixed = {key: alpha.softmax(0) for key, alpha in alphas.items()}
        with apply(self.supernet, {**self.space.default(), **mixed}):
            return self.task.loss(self.task.forward(self.supernet, batch), batch)

    def derive(self) -> Arch:
        """Return the arch of the strongest operations on the strongest edges (section 2.4)."""
        return derive_arch(self.space, self.names, {key: a.detach().softmax(0) for key, a in self.alphas.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return architecture weights and their optimizer's state."""
        alphas = {key: alpha.detach().clone() for key, alpha in self.alphas.items()}
        return {"alphas": alphas, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError for architecture weights of another space."""
        if {key: alpha.shape for key, alpha in state["alphas"].items()} != {k: a.shape for k, a in self.alphas.items()}:
            raise ValueError("architecture weights of another space")
        for key, alpha in self.alphas.items():
            alpha.data.copy_(state["alphas"][key])
        self.optimizer.load_state_dict(state["optimizer"])


# -- gradients of architecture weights --------------------------------------------------------------------------------


def first_order_gradient(valid_loss: Loss, alphas: Sequence[Tensor], step: Step) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the validation loss at the weights as they are, and its gradient by alpha (xi = 0 in eq. 6)."""
    loss = valid_loss()
    return loss.detach(), step.mean(_gradients(loss, alphas))


def second_order_gradient(
    train_loss: Loss, valid_loss: Loss, alphas: Sequence[Tensor], step: Step, radius: float = 0.01
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the validation loss after one more step of the weights, and its gradient by alpha (eq. 7 and 8).

    The weights are those of `step.optimizer`, and they are as they were in the end. Gradients are averaged over
    processes, so that all take the step that one process would.

    radius: how far, in all, the weights are moved for a finite difference
    """
    weights = [w for group in step.optimizer.param_groups for w in group["params"] if w.requires_grad]
    before = [w.detach() for w in weights]
    # Eq. 6: w' = w - xi dL_train(w, alpha)/dw
    unrolled = virtual_step(step, step.mean(_gradients(train_loss(), weights)))
    # Eq. 7: dL_val(w', alpha)/dalpha - xi d2L_train(w, alpha)/dalpha dw * dL_val(w', alpha)/dw'
    with standing_at(weights, unrolled):
        loss = valid_loss()
        gradients = step.mean(_gradients(loss, [*alphas, *weights]))
    own, towards = gradients[: len(alphas)], gradients[len(alphas) :]
    # Eq. 8: the product is (dL_train(w+, alpha)/dalpha - dL_train(w-, alpha)/dalpha) / 2R, w+- = w +- R dL_val/dw'
    norm = torch.stack([gradient.norm() for gradient in towards]).norm()
    reach = radius / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    sides = []
    for sign in (1, -1):
        with standing_at(weights, [w + sign * reach * g for w, g in zip(before, towards, strict=True)]):
            sides.append(step.mean(_gradients(train_loss(), alphas)))
    products = [(plus - minus) / (2 * reach) for plus, minus in zip(*sides, strict=True)]
    return loss.detach(), [g - step.lr * product for g, product in zip(own, products, strict=True)]


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of a loss, zeros for what it does not depend on."""
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@torch.no_grad()
def virtual_step(step: Step, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return where the weights would be after one step of SGD with the optimizer's momentum and weight decay.

    gradients: those of all its weights, group by group
    """
    moved, rest = [], iter(gradients)
    for group in step.optimizer.param_groups:
        momentum, decay = group.get("momentum", 0.0), group.get("weight_decay", 0.0)
        for w in (w for w in group["params"] if w.requires_grad):
            direction = next(rest) + decay * w
            velocity = step.optimizer.state.get(w, {}).get("momentum_buffer")
            if velocity is not None:
                direction = direction + momentum * velocity
            moved.append(w - step.lr * direction)
    return moved


@contextmanager
def standing_at(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Give weights other values for a while; they are then the same tensors as before, to the last bit."""
    before = [w.data for w in weights]
    try:
        for w, other in zip(weights, others, strict=True):
            w.data = other
        yield
    finally:
        for w, old in zip(weights, before, strict=True):
            w.data = old


# -- what is relaxed, and what is derived -----------------------------------------------------------------------------


def mixed_variables(model: nn.Module, space: SearchSpace) -> dict[str, tuple[Any, ...]]:
    """Return the variables that only mixed operations depend on, in order, each with its candidates in order.

    Raises UserError if there are none, or if layers of one variable have other candidates.
    """
    names: dict[str, tuple[Any, ...]] = {}
    elsewhere: set[str] = set()
    for mutable in mutables(model):
        values = [*mutable.elastic.values.values()]
        if isinstance(mutable, Mixing) and len(values) == 1 and isinstance(values[0], Variable):
            key, own = values[0].key, tuple(mutable.names)
            if names.setdefault(key, own) != own:
                text = f"layers of {key} mix other operations: {list(names[key])} and {list(own)}"
                raise UserError(text, key=("algorithm",))
        else:
            elsewhere.update(key for value in values for key in value.keys)
    mixed = {key: names[key] for key in space.keys if key in names.keys() - elsewhere and len(names[key]) > 1}
    if not mixed:
        text = "no layer of this network can mix what is searched"
        if shared := [key for key in space.keys if key in names.keys() & elsewhere]:
            text += f": {shared[0]} does not choose operations alone, other layers' shapes depend on it"
        hint = 'a space with choices of operations, for the backbone "darts" for instance'
        raise UserError(text, key=("algorithm",), hint=hint)
    return mixed


def derive_arch(space: SearchSpace, names: Mapping[str, Sequence[Any]], weights: Mapping[str, Tensor]) -> Arch:
    """Return the arch of the largest weights.

    names: key of each relaxed variable -> its candidates; weights: key -> the weight of each, after the softmax

    An operation is the candidate of the largest weight, "none" apart, and an edge is worth what this weight is. A
    variable that says which of the edges there are, equally many under each of its choices, has the choice whose edges
    are worth most: of each node of DARTS's cells the two strongest. All other variables are at their default, as they
    were in the training.
    """
    choices: dict[str, Any] = {}
    worth: dict[str, float] = {}
    for key, candidates in names.items():
        own = {*space[key].choices} - {NONE} or {*space[key].choices}
        pairs = zip(weights[key].tolist(), candidates, strict=True)
        worth[key], choices[key] = max((pair for pair in pairs if pair[1] in own), key=lambda pair: pair[0])
    for variable in space.variables:
        if variable.key in names or not (taken := _edges_by_choice(space, variable, names)):
            continue
        if len({len(edges) for edges in taken.values()}) == 1:
            choices[variable.key] = max(taken, key=lambda choice: sum(worth[edge] for edge in taken[choice]))
    return space.arch(choices)


def _edges_by_choice(space: SearchSpace, selector: Variable, relaxed: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Return which relaxed variables each choice of a variable makes active; nothing if they do not depend on it."""
    conditions = [(key, c.choices) for key in relaxed for c in space[key].when if c.key == selector.key]
    if not conditions:
        return {}
    return {choice: [key for key, allowed in conditions if choice in allowed] for choice in selector.choices}
