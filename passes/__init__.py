"""Graph rewrites on `torch.fx.GraphModule`, one a file."""
