"""File formats that a checkpoint is exported to, its integers, scales and zeros unchanged. One file a format."""
