"""What a person who chooses settings or models needs to see: copy-paste, identity, layer roles. No ComfyUI here."""
