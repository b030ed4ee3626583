"""Where a dynamic router's compute goes: token by token, by class of token, as pages and figures."""
