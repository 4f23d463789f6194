"""Declare how to make a language model cheaper; get the cheapest variant that is still good."""

__version__ = "0.1.0"
