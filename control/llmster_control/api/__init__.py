"""The control plane's HTTP surfaces."""
