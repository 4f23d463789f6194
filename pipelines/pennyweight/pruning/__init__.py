"""Pruning: blocks, channels of feed-forward nets and groups of heads are taken out, and a plain checkpoint stays."""
