"""What is minimized, and the loop that minimizes it."""
