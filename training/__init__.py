"""Training a DLA: data, the two stages, resuming, validation. The node and the script run the same loop."""
