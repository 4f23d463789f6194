"""Distillation: a student of any depth learns to predict what a teacher of the same vocabulary predicts."""
