"""Other people's quantizers. Each module's `run` writes a compressed-tensors checkpoint and returns the model that
computes what that checkpoint should compute."""
