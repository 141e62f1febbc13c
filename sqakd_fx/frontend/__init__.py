"""From a PyTorch model to a traced torch.fx graph that computes the same."""
