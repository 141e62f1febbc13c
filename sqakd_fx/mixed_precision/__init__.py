"""What each layer's bits cost the output, and bits that fit a budget."""
