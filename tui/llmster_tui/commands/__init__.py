"""The commands: `serve` starts things, `show` looks, `manage` changes."""
