"""Routers: from a budget to a sub-network, trained through a surrogate of the language loss.

In reading order:

- `static.py`, `dynamic.py`: the routers, from a budget to a choice for every block, and for every token besides;
- `pairs.py`, `surrogate.py`: what is measured of sub-networks, and what predicts their losses from it;
- `noise.py`, `objective.py`, `gate.py`: random choices with gradients, what a router minimises, and when it may learn;
- `feasible_decoding.py`, `ladder.py`, `budget_prices.py`: from a trained router to answers that keep to their budgets,
  sub-networks by rising cost for a static one, prices of cost for a dynamic one; `search.py` finds them without one;
- `trained.py`, `staleness.py`: what a checkpoint keeps, and what becomes of it when the network changes;
- `from_budget.py`: from a budget to an answer by what is kept; `from_surrogate.py`: from a kept surrogate to a router.

`plots.py` draws what they learned.
"""
