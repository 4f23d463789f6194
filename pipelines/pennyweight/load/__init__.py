"""Requests to a server from outside, and what they took: the load generator behind `pennyweight bench`.

A `Target` serves one request at a time to its caller; `driver` keeps many of them in flight. Everything later works on
the list of `Served` that came back.
"""
