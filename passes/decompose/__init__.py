"""The pass that writes compound operations as plain ones."""
