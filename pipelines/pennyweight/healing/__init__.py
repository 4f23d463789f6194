"""Healing: a quantized student learns to predict what the base predicts, without changing its size or format."""
