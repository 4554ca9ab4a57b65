"""A hub for llama.cpp machines: one OpenAI-compatible address, answers streamed."""

__version__ = "0.1.0"
__all__ = ["__version__"]
