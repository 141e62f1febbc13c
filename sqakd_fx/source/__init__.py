"""What the user gives: the model, its weights, the data."""
