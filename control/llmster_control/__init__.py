"""llmster's control plane."""

from llmster_daemon import __version__

__all__ = ["__version__"]
