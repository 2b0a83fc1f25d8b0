"""Stateful analysis: what a principal asked before says more about a query than the query itself."""
