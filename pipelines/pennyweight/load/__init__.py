"""Requests to a server from outside, or to a model in this process, and what they took: what `pennyweight bench` does.

A `Place` is where they are served: it connects to a `Target`, which serves one request at a time to its caller.
`driver` keeps many of them in flight. Everything later works on the list of `Served` that came back.
"""
