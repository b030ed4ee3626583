"""Compiled widths: code for every kind of block at every width, shared by layers that are alike (ours).

A handful of compilations serves all sub-networks, and a machine keeps what it has compiled.
"""
