"""Routers: from a budget to a sub-network, trained through a surrogate of the language loss."""
