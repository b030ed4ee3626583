"""A machine whose times are known: a clock that counts work instead of seconds."""

from flextron_lit.latency import block_times, routed_times
from flextron_lit.latency.block_times import Passes


def put_in_place(monkeypatch, run, state, mlp=0.1):
    """Passes run as said, and take what `state["last"]` says then; an MLP takes such a share of the full network."""
    monkeypatch.setattr(Passes, "_run", run)
    monkeypatch.setattr(block_times.DynamicCache, "crop", lambda self, length: None)
    monkeypatch.setattr(block_times, "seconds", lambda run, device: run() or state["last"])
    for module in (block_times, routed_times):
        monkeypatch.setattr(module, "time_shares", lambda *_: {"attention": 0.05, "mlp": mlp})
    return state
