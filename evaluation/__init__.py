"""Metrics: copy-paste, identity, orientation, layer weights. No ComfyUI here, but for what loaders bring in."""
