"""The distribution of a canvas given that an automaton accepts it. Exact, all positions at once.

In: the log-mass of every token class at every row, the automaton. Out: ``Posterior``.

The automaton is a hidden Markov chain over the rows of a canvas (arXiv 2607.07026): a path's weight
is the product of the masses of the classes it reads. From the last row to the first, the weight of
all that may follow a state is summed; from the first row to the last, the chain so conditioned is
followed. A joint sample walks it with one uniform a row. The most likely canvas (DINGO, arXiv
2505.23061) is the same with tokens for classes and the largest in place of the sum.

Everything stays in the log domain and fp64 until it is a probability: if a model disagrees with its
constraint, weights are hundreds of nats apart within a row, thousands over a canvas.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.automaton import native
from vllm_diffusion.constrain.automaton.record import Posterior
from vllm_diffusion.constrain.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.constrain.automaton.edges import Edges


def condition(
    log_mass: Tensor,
    best_log_prob: Tensor,
    free: Tensor,
    *,
    edges: Edges,
    start: Tensor,
    rows: Tensor,
    left: Tensor,
    uniforms: Tensor,
) -> Posterior:
    """Condition canvases on an automaton that they share.

    A canvas is accepted if its first ``rows`` tokens lead from ``start`` to a state from which the
    text can be completed in ``left`` tokens more.

    Args:
        log_mass: [B, L, C] fp32, log of every class's share of its row, -inf for nothing; class 0
            is not read.
        best_log_prob: [B, L, C] fp32, log-probability of the likeliest token of each class.
        free: [B, L] fp32, log-probability of the row's likeliest token of all, which stands in a
            row behind the end.
        edges: the automaton.
        start: [B] int64, the state before the first row.
        rows: [B] int64, constrained rows, at most L.
        left: [B] int64, tokens that may follow the constrained rows.
        uniforms: [B, L] fp32 in (0, 1), for the sample.
    """
    asked = {
        "log_mass": log_mass,
        "best_log_prob": best_log_prob,
        "free": free,
        "start": start,
        "rows": rows,
        "left": left,
        "uniforms": uniforms,
    }
    if edges.merged is None:
        return chain(edges=edges, **asked)
    # On a GPU the chain takes tens of small launches a row. The host is faster, and waits for the
    # device once.
    host = to_device(asked, torch.device("cpu"))
    posterior = native.condition(merged=edges.merged, **host)
    values = {each.name: getattr(posterior, each.name) for each in fields(Posterior)}
    return Posterior(**to_device(values, log_mass.device))


def chain(
    *,
    log_mass: Tensor,
    best_log_prob: Tensor,
    free: Tensor,
    edges: Edges,
    start: Tensor,
    rows: Tensor,
    left: Tensor,
    uniforms: Tensor,
) -> Posterior:
    """The definition of ``condition``, in torch."""
    length = free.shape[1]
    mass, token = (logs.double().permute(1, 2, 0) for logs in (log_mass, best_log_prob))
    completes = edges.distance[:, None] <= left  # [N, B]
    final = torch.zeros_like(completes, dtype=torch.float64).masked_fill(~completes, -torch.inf)
    constrained = torch.arange(length, device=free.device)[:, None] < rows  # [L, B]
    stay = free.double().T  # [L, B]
    weight = _backward(edges, mass, torch.zeros_like(stay), final, constrained, edges.total)
    value = _backward(edges, token, stay, final, constrained, edges.best)

    log_z = weight[0].gather(0, start[None])[0]
    constrained &= log_z > -torch.inf
    marginal, ended = _forward(edges, mass, weight, start, constrained)
    sample, _ = _walk(edges, mass, weight, start, constrained, _drawn(uniforms.double().T))
    best, state = _walk(edges, token, value, start, constrained, _largest)
    return Posterior(
        marginal=marginal.permute(2, 0, 1).float(),
        ended=ended.T.float(),
        sample_class=sample.T,
        map_class=best.T,
        map_state=state.T,
        log_z=log_z,
    )


def _backward(  # noqa: PLR0917 - the terms of one recursion
    edges: Edges,
    symbol: Tensor,
    stay: Tensor,
    final: Tensor,
    constrained: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """[L + 1, N, B] fp64, log of the total (or largest) weight of what may follow a state.

    Args:
        edges: the automaton.
        symbol: [L, C, B] fp64, log-weight of a class.
        stay: [L, B] fp64, log-weight of a row behind the end.
        final: [N, B] fp64, log-weight of a state behind the last row.
        constrained: [L, B] bool; the other rows weigh nothing.
        reduce: over the edges that leave a state.
    """
    behind = final.new_empty(len(symbol) + 1, *final.shape)
    behind[-1] = final
    for row in reversed(range(len(symbol))):
        after = behind[row + 1]
        here = reduce(_through(edges, symbol[row], after))
        here[edges.end] = stay[row] + after[edges.end]
        behind[row] = torch.where(constrained[row], here, after)
    return behind


def _forward(
    edges: Edges, symbol: Tensor, weight: Tensor, start: Tensor, constrained: Tensor
) -> tuple[Tensor, Tensor]:
    """The marginals of the classes [L, C, B] and of being free [L, B], both fp64."""
    marginal, ended = torch.empty_like(symbol), torch.empty_like(symbol[:, 0])
    state = torch.zeros_like(weight[0]).scatter_(0, start[None], 1.0)  # [N, B], probabilities
    for row in range(len(symbol)):
        # No state that is reached has a weight of nothing; the others must not give NaN.
        before = weight[row].masked_fill(weight[row] == -torch.inf, 0.0)
        through = _through(edges, symbol[row], weight[row + 1])
        step = (through - before.index_select(0, edges.source)).exp()
        flow = torch.where(constrained[row], state.index_select(0, edges.source), 0.0) * step
        marginal[row] = edges.reading.total(flow)
        ended[row] = torch.where(constrained[row], state[edges.end], 1.0)
        moved = edges.into.total(flow)
        moved[edges.end] += state[edges.end]
        state = torch.where(constrained[row], moved, state)
    return marginal, ended


def _walk(  # noqa: PLR0917 - the terms of one walk
    edges: Edges,
    symbol: Tensor,
    weight: Tensor,
    start: Tensor,
    constrained: Tensor,
    choose: Callable[[int, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The classes on one path and the states behind them, both [L, B] int64; -1: free.

    Args:
        edges, symbol, weight, start, constrained: as above.
        choose: [B] int64, a place in the edges that leave each state, given the row, the
            log-weights [D, B] of the paths through them, and of all paths [B].
    """
    place = torch.arange(edges.degree, device=start.device)[:, None]
    state, classes, states = start, [], []
    for row in range(len(symbol)):
        edge = edges.first[state] + place  # [D, B]
        none = edge >= edges.first[state + 1]
        edge = edge.masked_fill(none, 0)
        reads, leads = edges.symbol[edge], edges.target[edge]
        through = symbol[row].gather(0, reads) + weight[row + 1].gather(0, leads)
        here = weight[row].gather(0, state[None])[0]
        chosen = choose(row, through.masked_fill(none, -torch.inf), here)[None]
        goes = constrained[row] & (state != edges.end)
        classes.append(torch.where(goes, reads.gather(0, chosen)[0], -1))
        state = torch.where(goes, leads.gather(0, chosen)[0], state)
        states.append(state)
    return torch.stack(classes), torch.stack(states)


def _largest(_row: int, through: Tensor, _here: Tensor) -> Tensor:
    return through.argmax(dim=0)  # the first among equals: the lowest class


def _drawn(uniforms: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Draw by the inverse of the distribution function, with ``uniforms`` [L, B] fp64."""

    def choose(row: int, through: Tensor, here: Tensor) -> Tensor:
        share = (through - here.masked_fill(here == -torch.inf, 0.0)).exp()
        above = share.cumsum(dim=0) > uniforms[row]
        # Rounding may keep the sum below the uniform: then the last edge that has any share.
        place = torch.arange(len(share), device=share.device)[:, None]
        last = torch.where(share > 0, place, 0).amax(dim=0)
        return torch.where(above.any(dim=0), above.int().argmax(dim=0), last)

    return choose


def _through(edges: Edges, symbol: Tensor, after: Tensor) -> Tensor:
    """[E, B], log-weight of every edge and what may follow it."""
    return symbol.index_select(0, edges.symbol) + after.index_select(0, edges.target)
