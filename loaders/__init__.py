"""Files to models, under the host's model management."""
