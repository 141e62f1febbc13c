"""The pass from a trained graph to the integer program."""
